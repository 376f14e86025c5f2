"""The stream gives every cell its own image and counts, and every reader its fair share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phenoseq.data import dataset as dataset_module
from phenoseq.data import store as store_module
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.dataset import CellStream
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import write_store
from phenoseq.errors import DataError

BY_WELL = SplitConfig(by="Metadata_Well", block=None, test=0.2, val=0.25, cal=0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory, ramp_source):
    """Give a store of about 380 cells in chunks of 16 and shards of 64."""
    path = tmp_path_factory.mktemp("stream") / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "CHUNK", 16)
        patch.setattr(store_module, "SHARD", 64)
        return write_store(ramp_source(400), path, pixel_size=0.5, crop_px=8)


@pytest.fixture(scope="module")
def counts(store):
    return store.table().X


@pytest.fixture(scope="module")
def rows(store):
    """Give two thirds of the cells, unevenly over the chunks, in no order."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(store))[: len(store) * 2 // 3]
    return chosen[(chosen // 16) % 5 != 3]


@pytest.fixture
def stream(store, counts, rows):
    def make(**options):
        return CellStream(
            store.path, rows, counts, **{"batch_size": 10, "shuffle": True, **options}
        )

    return make


def rows_of(batches):
    return [batch["rows"].tolist() for batch in batches]


def flat(batches):
    return [row for batch in rows_of(batches) for row in batch]


# ------------------------------------------------------------------------------------- one reader


@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 10, 1000])
def test_without_shuffling_every_cell_once_in_order(stream, rows, batch_size, window):
    one = stream(shuffle=False, batch_size=batch_size, window=window)
    batches = rows_of(one)
    assert [row for batch in batches for row in batch] == sorted(rows)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert len(batches) == len(one) == -(-len(rows) // batch_size)
    assert rows_of(one) == batches


@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 10, 64])
def test_shuffled_full_batches_without_repeats(stream, rows, batch_size, window):
    one = stream(batch_size=batch_size, window=window)
    batches = rows_of(one)
    seen = [row for batch in batches for row in batch]
    assert {len(batch) for batch in batches} == {batch_size}
    assert len(batches) == len(one) == len(rows) // batch_size
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(rows.tolist())


def test_shuffling_mixes_the_cells(stream):
    """Not only the chunks: a batch has cells of many."""
    batches = rows_of(stream(batch_size=16))
    assert np.mean([len({row // 16 for row in batch}) for batch in batches]) > 5
    assert all(batch != sorted(batch) for batch in batches)


def test_every_cell_is_seen_over_epochs(stream, rows):
    """The cells that make no full batch are others in each epoch."""
    one, seen = stream(batch_size=64), set()
    for epoch in range(12):
        one.set_epoch(epoch)
        seen |= set(flat(one))
    assert seen == set(rows.tolist())


def test_order_depends_on_seed_and_epoch_alone(stream):
    def order(seed, epoch):
        one = stream(seed=seed)
        one.set_epoch(epoch)
        return flat(one)

    assert order(0, 0) == order(0, 0)
    assert order(3, 5) == order(3, 5)
    orders = [tuple(order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_images_and_counts_are_of_their_cell(stream, store, counts, shuffle):
    crops, dense = store.crops[:], counts.toarray()
    for batch in stream(shuffle=shuffle, window=2):
        chosen = batch["rows"].numpy()
        assert batch["images"].dtype == torch.int32  # torch has no arithmetic on uint16
        assert batch["counts"].dtype == torch.float32
        np.testing.assert_array_equal(batch["images"], crops[chosen])
        np.testing.assert_array_equal(batch["counts"], dense[chosen])


# ----------------------------------------------------------------------------------- many readers


def in_rank(monkeypatch, world, rank):
    monkeypatch.setattr(dataset_module, "_world", lambda: world)
    monkeypatch.setattr(dataset_module, "_rank", lambda: rank)


def as_worker(monkeypatch, workers, number):
    class Info:
        num_workers, id = workers, number

    monkeypatch.setattr(dataset_module, "get_worker_info", lambda: Info)


def everything(make, monkeypatch, world, workers, epoch=0):
    """Return the batches of each rank, over its workers, and the length that it stated."""
    out = []
    for rank in range(world):
        in_rank(monkeypatch, world, rank)
        one = make(workers=workers)
        one.set_epoch(epoch)
        batches = []
        for number in range(workers):
            as_worker(monkeypatch, workers, number)
            # In a worker no process group is there to ask.
            in_rank(monkeypatch, 1, 0)
            batches += rows_of(one)
        monkeypatch.setattr(dataset_module, "get_worker_info", lambda: None)
        out.append((batches, len(one)))
    return out


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (3, 1), (2, 2), (1, 5)])
def test_readers_share_disjointly_and_alike(stream, rows, monkeypatch, world, workers):
    for epoch in range(4):
        out = everything(stream, monkeypatch, world, workers, epoch)
        seen = [row for batches, _ in out for batch in batches for row in batch]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(rows.tolist())
        expected = len(rows) // (10 * world * workers) * workers  # the same in each epoch
        for batches, stated in out:
            assert len(batches) == stated == expected
            assert {len(batch) for batch in batches} == {10}


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (3, 1), (2, 2), (3, 20)])
def test_readers_share_every_cell_without_shuffling(stream, rows, monkeypatch, world, workers):
    """Also where there are more readers than chunks."""

    def make(**options):
        return stream(shuffle=False, **options)

    out = everything(make, monkeypatch, world, workers)
    seen = [row for batches, _ in out for batch in batches for row in batch]
    assert sorted(seen) == sorted(rows.tolist())
    for batches, stated in out:
        assert len(batches) == stated


def test_more_readers_than_full_batches(stream, rows, monkeypatch):
    """No epoch of nothing, without a word."""
    with pytest.raises(DataError, match=rf"{len(rows)} cells give no full batch of 1000"):
        list(stream(batch_size=1000))
    with pytest.raises(DataError, match="each of 40 readers"):
        len(stream(workers=40))
    in_rank(monkeypatch, 2, 1)
    with pytest.raises(DataError, match="each of 2 readers"):
        next(iter(stream(batch_size=len(rows) // 2 + 1)))


# ------------------------------------------------------------------------------------ datamodule


def module(store, **options):
    data = StoreDataModule(store.path, BY_WELL, batch_size=10, **options)
    data.setup()
    return data


def test_loaders_are_of_their_parts(store):
    data = module(store)
    train, val = data.train_dataloader(), data.val_dataloader()
    assert sorted(flat(val)) == data.parts.rows("val").tolist()
    assert set(flat(train)) <= set(data.parts.rows("train").tolist())
    well = data.table.obs["Metadata_Well"].to_numpy()
    assert not set(well[flat(train)]) & set(well[data.parts.rows("test")])
    assert len(train) == len(rows_of(train))
    assert len(val) == len(rows_of(val))


def test_validation_cells_are_drawn_once(store):
    data = module(store, max_val=20, seed=1)
    first = flat(data.val_dataloader())
    assert len(first) == 20
    assert first == sorted(first) == flat(data.val_dataloader())
    assert first == flat(module(store, max_val=20, seed=1).val_dataloader())
    assert first != flat(module(store, max_val=20, seed=2).val_dataloader())


def test_image_sample(store):
    data = module(store)
    chosen = data.some("train", 15)
    assert len(chosen) == 15
    np.testing.assert_array_equal(data.image_sample("train", 15), store.crops[:][chosen])
    assert len(data.image_sample("val", 10**6)) == len(data.parts.rows("val"))


def test_split_counts_the_cells_that_are_not_in_the_store(store):
    data = module(store)
    assert len(data.opened.all_cells()) == 400
    assert len(data.table) < 400


def test_setup_of_what_is_no_store(tmp_path):
    with pytest.raises(DataError, match="no phenoseq store"):
        StoreDataModule(tmp_path / "nowhere.zarr").setup()


def test_two_worker_processes_give_the_same_cells(store):
    alone, both = module(store), module(store, num_workers=2)
    val = list(both.val_dataloader())
    assert sorted(flat(val)) == sorted(flat(alone.val_dataloader()))
    crops, dense = store.crops[:], both.counts.toarray()
    for batch in val:
        chosen = batch["rows"].numpy()
        np.testing.assert_array_equal(batch["images"], crops[chosen])
        np.testing.assert_array_equal(batch["counts"], dense[chosen])
    assert len(both.val_dataloader()) == len(val)
    assert len(both.train_dataloader()) == len(alone.parts.rows("train")) // 20 * 2


def test_store_is_not_written_to(store):
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    flat(module(store).train_dataloader())
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == before
