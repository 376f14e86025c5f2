"""Hands batches from a reading process to the training process, in memory that is used again.

Between processes, memory must be shared, and a system gives it page by page at every first touch:
for a batch in new shared memory, as torch makes it, that takes about as long as decoding it. So a
reader writes a batch where an earlier one was, as soon as nothing in the training process holds
that one any more.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Batch = dict[str, Tensor]
Arrays = dict[str, NDArray[Any]]
#: What arrays a batch has: shape and type of each.
Spec = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]

# Before the arrays, a byte for each that is 1 as long as it is in use. Arrays begin at multiples.
_HEAD = 64
# Batches that new memory is made for at once: to hand memory over takes longer than a batch.
_SLOTS = 4


@dataclass(frozen=True)
class Parcel:
    """A batch in shared memory, on its way.

    Attributes
    ----------
    reader, block, place
        Whose memory it is, which piece of it, and where in that the batch begins.
    spec
        What lies there.
    memory
        The piece itself, where the training process has not seen it before.
    """

    reader: int
    block: int
    place: int
    spec: Spec
    memory: Tensor | None


#: What a stream gives: a batch, or a parcel to another process.
Item = Batch | Parcel


def fresh(spec: Spec) -> tuple[Batch, Arrays]:
    """Return a batch in memory of its own, and its arrays, to be written."""
    arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in spec.items()}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, arrays


class Outbox:
    """A reader's end.

    Parameters
    ----------
    reader
        Number of this reader.
    """

    def __init__(self, reader: int) -> None:
        self.reader = reader
        self._blocks = 0
        self._slots: list[tuple[int, int, NDArray[np.uint8]]] = []

    def new(self, spec: Spec) -> tuple[Parcel, Arrays]:
        """Return a parcel, to be sent, and its arrays, to be written before."""
        size = _HEAD + sum(_size(*entry) for entry in spec.values())
        shared = None
        free = self._free(size)
        if free is None:
            shared = torch.zeros(_SLOTS * size, dtype=torch.uint8)
            shared.share_memory_()  # type: ignore[no-untyped-call]
            free = len(self._slots)
            for at in range(0, _SLOTS * size, size):
                self._slots.append((self._blocks, at, shared.numpy()[at : at + size]))
            self._blocks += 1
        block, place, memory = self._slots[free]
        memory[: len(spec)] = 1
        return Parcel(self.reader, block, place, spec, shared), dict(_arrays(memory, spec))

    def _free(self, size: int) -> int | None:
        for number, (_, _, memory) in enumerate(self._slots):
            if len(memory) >= size and not memory[:_HEAD].any():
                return number
        return None


class Inbox:
    """The training process's end, for one pass."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def open(self, parcel: Parcel) -> Batch:
        """Return a batch, whose memory goes back to the reader when the last of it is dropped."""
        key = (parcel.reader, parcel.block)
        if parcel.memory is not None:
            self._blocks[key] = parcel.memory.numpy()
        memory = self._blocks[key][parcel.place :]
        batch = {}
        for k, (name, array) in enumerate(_arrays(memory, parcel.spec)):
            batch[name] = torch.from_numpy(array)  # holds this very array
            weakref.finalize(array, memory.__setitem__, k, 0).atexit = False
        return batch


def _arrays(memory: NDArray[np.uint8], spec: Spec) -> Iterator[tuple[str, NDArray[Any]]]:
    at = _HEAD
    for name, (shape, dtype) in spec.items():
        size = math.prod(shape) * dtype.itemsize
        yield name, memory[at : at + size].view(dtype).reshape(shape)
        at += _size(shape, dtype)


def _size(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _HEAD) * _HEAD
