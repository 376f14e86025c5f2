"""The errors that phenoseq raises on purpose, each written for the person at the keyboard."""

from __future__ import annotations


class PhenoseqError(Exception):
    """Base of every error that phenoseq raises on purpose.

    The message says what was wrong, where (file, key, cell), and what to do about it.
    """


class DataError(PhenoseqError):
    """Images, tables or stores that cannot be used as they are."""


class ModelError(PhenoseqError):
    """A model that is unknown, unreadable, or does not fit the data given to it."""


class PhenoseqWarning(UserWarning):
    """Something that makes a result worse than it could be, and is recorded in it."""
