"""Batches come to the training process as they were written, and stay so while they are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phenoseq.data.handover import Inbox, Outbox, fresh


def spec(n):
    return {
        "images": ((n, 2, 3, 3), np.dtype(np.uint16)),
        "keep": ((n,), np.dtype(np.bool_)),
        "counts": ((n, 7), np.dtype(np.float32)),
        "rows": ((n,), np.dtype(np.int64)),
    }


def fill(arrays, value):
    for array in arrays.values():
        array[:] = value


@pytest.fixture
def send():
    """Give the two ends of one reader, joined; memory that was sent once is not sent again."""
    outbox, inbox, seen = Outbox(0), Inbox(), set()

    def one(n, value):
        parcel, arrays = outbox.new(spec(n))
        assert (parcel.memory is None) is (parcel.block in seen)
        seen.add(parcel.block)
        fill(arrays, value)
        return inbox.open(parcel), (parcel.block, parcel.place)

    return one


def test_a_batch_arrives_as_it_was_written(send):
    batch, _ = send(5, 1)
    assert list(batch) == list(spec(5))
    for name, (shape, dtype) in spec(5).items():
        assert batch[name].shape == shape
        assert batch[name].numpy().dtype == dtype
        assert (batch[name].numpy() == 1).all()
    assert batch["images"].float().dtype == torch.float32


def test_memory_is_used_again_once_nothing_holds_it(send):
    slots = []
    for value in range(10):
        batch, slot = send(5, value)
        slots.append(slot)
        assert (batch["rows"] == value).all()
        del batch
    assert set(slots) == {(0, 0)}


@pytest.mark.parametrize("part", ["tensor", "slice", "numpy"])
def test_memory_is_not_used_while_a_part_of_a_batch_is_kept(send, part):
    batch, first = send(5, 1)
    kept = batch["counts"]
    if part == "slice":
        kept = kept[2:4, ::2]
    elif part == "numpy":
        kept = kept.numpy()
    del batch
    others = [send(5, value) for value in range(2, 9)]
    assert first not in {slot for _, slot in others}
    assert (kept == 1).all()
    for value, (other, _) in zip(range(2, 9), others, strict=True):
        assert all((tensor.numpy() == spec_value(tensor, value)).all() for tensor in other.values())


def spec_value(tensor, value):
    return True if tensor.dtype == torch.bool else value


def test_a_larger_batch_gets_memory_of_its_own(send):
    batch, first = send(3, 1)
    del batch
    batch, second = send(9, 2)
    assert second != first
    assert (batch["counts"] == 2).all()


def test_fresh_memory_is_shared_with_the_arrays():
    batch, arrays = fresh(spec(4))
    fill(arrays, 1)
    assert all((tensor.numpy() == 1).all() for tensor in batch.values())
