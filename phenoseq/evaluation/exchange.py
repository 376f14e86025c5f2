"""Least squares over the wells of a screen, and its tests by exchange of labels."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.errors import DataError

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Fit:
    """Least squares of ``plate + treatment`` to the profiles of wells.

    Parameters
    ----------
    values
        Of wells, ``(n_wells, n_genes)``.
    label, plate
        Treatment and plate of each, ``(n_wells,)``.
    control
        The treatment that all others are compared with.

    Attributes
    ----------
    names
        Treatments with two wells or more, without the control.
    single
        Those with one, which are not scored.
    change, error, t
        Of each against the control, ``(n_treatments, n_genes)``.
    freedom
        Degrees of freedom of the residuals.

    Raises
    ------
    DataError
        Where a plate has no control, no treatment has two wells, or nothing is left to compare.
    """

    def __init__(
        self, values: Float, label: NDArray[np.str_], plate: NDArray[np.str_], control: str
    ) -> None:
        bare = sorted(set(plate.tolist()) - set(plate[label == control].tolist()))
        if bare:
            raise DataError(f"plates without a well of {control!r} (or all set apart): {bare}")
        counts = pd.Series(label).value_counts()
        every = sorted(set(label.tolist()) - {control})
        self.names = [name for name in every if counts[name] > 1]
        self.single = [name for name in every if counts[name] == 1]
        if not self.names:
            raise DataError(
                "no treatment has two wells that count; the change of one well has no certainty"
            )
        self._label, self._plate, self._control = label, plate, control
        plates = plate[:, None] == np.unique(plate)
        self._design = np.hstack([plates, label[:, None] == np.array(every)]).astype(np.float64)
        self.freedom = int(len(label) - np.linalg.matrix_rank(self._design))
        if self.freedom < 1:
            raise DataError("as many treatments and plates as wells; nothing is left to compare")
        self._inverse = np.linalg.pinv(self._design.T @ self._design)
        coefficients = self._inverse @ self._design.T @ values
        self._residual = values - self._design @ coefficients
        self._column = [plates.shape[1] + every.index(name) for name in self.names]
        self.change: Float = coefficients[self._column]
        size = np.diag(self._inverse)[self._column][:, None]
        explained = self.change**2 / size
        # the sum of squares that is left where the treatment is taken for a control
        self._left = (self._residual**2).sum(axis=0) + explained
        # so that genes that are constant have a variance
        self._left += 1e-9 * self._left.mean(axis=1, keepdims=True) + 1e-30
        self.error: Float = np.sqrt(size * (self._left - explained) / self.freedom)
        self.t: Float = self.change / self.error

    def exchange(
        self, treatment: int, times: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], Mask]:
        """Exchange the labels of a treatment's and the control's wells at random within plates.

        Parameters
        ----------
        treatment
            Its place in ``names``.
        times, rng
            Exchanges to draw, and what they are drawn by.

        Returns
        -------
        The wells of both on the plates of the treatment, ``(m,)``, and which of them are labelled
        as treated, ``(1 + times, m)``: first as it is, then exchanged.
        """
        name = self.names[treatment]
        pool, drawn = [], []
        for plate in np.unique(self._plate[self._label == name]):
            of_both = (self._label == name) | (self._label == self._control)
            here = np.flatnonzero((self._plate == plate) & of_both)
            treated = np.tile(self._label[here] == name, (1 + times, 1))
            rng.permuted(treated[1:], axis=1, out=treated[1:])
            pool.append(here)
            drawn.append(treated)
        return np.concatenate(pool), np.concatenate(drawn, axis=1)

    def exchanged(self, treatment: int, pool: NDArray[np.int64], drawn: Mask) -> Float:
        """Return the t of a treatment, fitted anew under each exchange of labels.

        All is fitted anew, the variance of the residuals too, so that under the null hypothesis
        the first row is one of the others, and the share of rows that give as much an exact p
        (Phipson and Smyth 2010). By the theorem of Frisch, Waugh and Lovell the fit is that of the
        labels to what is left of the profiles where the treatment's wells are taken for controls.

        Parameters
        ----------
        treatment
            Its place in ``names``.
        pool, drawn
            From :meth:`exchange`.

        Returns
        -------
        ``(1 + times, n_genes)``; the first row is that of ``t``.
        """
        column, design = self._column[treatment], self._design[pool]
        size = self._inverse[column, column]
        lever = design @ self._inverse[:, column]
        left = self._residual[pool] + np.outer(lever / size, self.change[treatment])
        free = np.eye(len(pool)) - design @ self._inverse @ design.T + np.outer(lever, lever) / size
        labels = drawn.astype(np.float64)
        found = labels @ left / np.sqrt(((labels @ free) * labels).sum(axis=1))[:, None]
        return np.asarray(found * np.sqrt(self.freedom / (self._left[treatment] - found**2)))


def retrieval(profiles: Float, plate: NDArray[np.str_], drawn: Mask) -> Float:
    """Return the mean average precision with which treated wells find each other among controls.

    By cosine similarity, as :func:`~phenoseq.evaluation.treatments.map_replicate`. Profiles are
    centred on the mean of all the wells of a plate that are compared: on that of the controls
    alone, treated wells would resemble each other by the controls' chance.

    Parameters
    ----------
    profiles
        Of a treatment's and the control's wells, ``(m, n_genes)``.
    plate
        Of each, ``(m,)``.
    drawn
        Which are labelled as treated, ``(n, m)``, as many in each row.

    Returns
    -------
    ``(n,)``.
    """
    centred = profiles.astype(np.float64)
    for one in np.unique(plate):
        centred[plate == one] -= centred[plate == one].mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
    similarity = centred @ centred.T
    np.fill_diagonal(similarity, -np.inf)
    others = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]
    row, query = np.nonzero(drawn)
    hits = drawn[row[:, None], others[query]]
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    each = (precision * hits).sum(axis=1) / hits.sum(axis=1)
    return np.asarray(each.reshape(len(drawn), -1).mean(axis=1))


def first_and_p(values: Float) -> Float:
    """Return a statistic as it is, and the share of exchanges in which it is as large or larger.

    Parameters
    ----------
    values
        ``(1 + times, ...)``: as it is, then exchanged. Large is far from zero.

    Returns
    -------
    ``(2, ...)``.
    """
    large = np.abs(values)
    return np.stack([values[0], (large >= large[0] * (1 - 1e-9)).mean(axis=0)])
