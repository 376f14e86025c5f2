"""The stream gives every cell its own image and counts, and every reader its fair share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from phenoseq.data import arrays as arrays_module
from phenoseq.data import dataset as dataset_module
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.dataset import CellStream
from phenoseq.data.splits import SplitConfig
from phenoseq.data.storewriter import write_store
from phenoseq.data.window import Window
from phenoseq.errors import DataError

BY_WELL = SplitConfig(by="Metadata_Well", block=None, test=0.2, val=0.25, cal=0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory, ramp_source):
    """Give a store of about 380 cells in chunks of 16 and shards of 64."""
    path = tmp_path_factory.mktemp("stream") / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays_module, "CHUNK", 16)
        patch.setattr(arrays_module, "SHARD", 64)
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
def stream(store, rows):
    def make(**options):
        return CellStream(store.path, rows, **{"batch_size": 10, "shuffle": True, **options})

    return make


def rows_of(batches):
    return [batch["rows"].tolist() for batch in batches]


def flat(batches):
    return [row for batch in rows_of(batches) for row in batch]


# ------------------------------------------------------------------------------------- one reader


@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 10, 64, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_cell_once_in_batches_of_nearly_one_size(stream, rows, batch_size, window, shuffle):
    one = stream(shuffle=shuffle, batch_size=batch_size, window=window)
    batches = rows_of(one)
    seen = [row for batch in batches for row in batch]
    assert sorted(seen) == sorted(rows)
    assert (seen == sorted(seen)) is not shuffle
    assert len(batches) == len(one) == -(-len(rows) // batch_size)
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_shuffling_mixes_the_cells(stream):
    """Not only the chunks: a batch has cells of many."""
    batches = rows_of(stream(batch_size=16))
    assert np.mean([len({row // 16 for row in batch}) for batch in batches]) > 5
    assert all(batch != sorted(batch) for batch in batches)


def test_shards_are_read_whole_and_once(stream, store, monkeypatch):
    read = []
    load = Window.load
    monkeypatch.setattr(Window, "load", lambda self, some: read.append(some) or load(self, some))
    list(stream(window=1, batch_size=2))
    shards = [some // store.shard for some in read if len(some)]
    assert all(shard.min() == shard.max() for shard in shards)
    order = [int(shard[0]) for shard in shards]
    assert len(set(order)) == len(order)
    assert order != sorted(order)


def test_order_depends_on_seed_and_epoch_alone(stream):
    def order(seed, epoch):
        one = stream(seed=seed)
        one.epoch = epoch
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
        assert batch["images"].dtype == torch.uint16
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


def everything(make, monkeypatch, world, workers, epoch=0, start=0):
    """Return the batches of each rank, in the order in which its loader takes them in turn."""
    out = []
    for rank in range(world):
        in_rank(monkeypatch, world, rank)
        one = make(workers=max(workers, 1))
        one.epoch, one.start = epoch, start
        # In a worker no process group is there to ask.
        in_rank(monkeypatch, 1, 0)
        each = []
        for number in range(max(workers, 1)):
            if workers:
                as_worker(monkeypatch, workers, number)
            each.append(rows_of(one))
        monkeypatch.setattr(dataset_module, "get_worker_info", lambda: None)
        turns = itertools.zip_longest(*each)
        out.append([batch for turn in turns for batch in turn if batch is not None])
        assert len(out[-1]) == len(one) - start
    return out


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_cell_once_an_epoch_on_every_number_of_readers(
    stream, rows, monkeypatch, world, workers, shuffle
):
    def make(**options):
        return stream(shuffle=shuffle, **options)

    for epoch in range(3):
        out = everything(make, monkeypatch, world, workers, epoch)
        assert sorted(row for rank in out for batch in rank for row in batch) == sorted(rows)
        assert len({len(rank) for rank in out}) == 1
        sizes = {len(batch) for rank in out for batch in rank}
        assert max(sizes) <= 10
        assert max(sizes) - min(sizes) <= 2


def test_readers_draw_differently(stream, monkeypatch):
    """Every rank, worker and epoch has an order of its own."""
    inside = [
        np.argsort(np.argsort(batch)).tolist()
        for epoch in (0, 1)
        for rank in everything(stream, monkeypatch, 2, 2, epoch)
        for batch in rank[:2]
    ]
    assert len({tuple(order) for order in inside}) == len(inside) == 8


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("start", [1, 2, 7, 8])
def test_going_on_in_the_middle_of_an_epoch(stream, monkeypatch, start, workers):
    whole = everything(stream, monkeypatch, 2, workers, epoch=1)
    rest = everything(stream, monkeypatch, 2, workers, epoch=1, start=start)
    assert rest == [rank[start:] for rank in whole]


def test_going_on_reads_no_cell_that_was_given(stream, monkeypatch):
    read = []
    load = Window.load
    monkeypatch.setattr(Window, "load", lambda self, some: read.extend(some) or load(self, some))
    one = stream(window=1)
    one.start = len(one) - 1
    assert len(rows_of(one)) == 1
    assert len(read) <= 10


def test_too_few_cells_for_the_readers(stream, rows, monkeypatch):
    """No reader without a batch, and no word."""
    with pytest.raises(DataError, match=rf"{len(rows)} cells cannot be shared by 1000 readers"):
        len(stream(workers=1000))
    in_rank(monkeypatch, 3, 1)
    with pytest.raises(DataError, match="or larger batches"):
        list(stream(batch_size=1, workers=7))


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
    well = data.opened.obs()["Metadata_Well"].to_numpy()
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


def test_some_cells_of_a_part(store):
    data = module(store)
    chosen = data.some("train", 15)
    assert len(set(chosen)) == 15
    assert set(chosen) <= set(data.parts.rows("train"))
    np.testing.assert_array_equal(data.some("val", 10**6), data.parts.rows("val"))


def test_split_counts_the_cells_that_are_not_in_the_store(store):
    data = module(store)
    assert len(data.opened.all_cells()) == 400
    assert len(data.opened) < 400


def test_setup_of_what_is_no_store(tmp_path):
    with pytest.raises(DataError, match="no phenoseq store"):
        StoreDataModule(tmp_path / "nowhere.zarr").setup()


@pytest.mark.usefixtures("fork")
def test_two_worker_processes_give_the_same_cells(store):
    alone, both = module(store), module(store, num_workers=2)
    val = list(both.val_dataloader())
    assert sorted(flat(val)) == sorted(flat(alone.val_dataloader()))
    crops, dense = store.crops[:], store.table().X.toarray()
    for batch in val:
        chosen = batch["rows"].numpy()
        np.testing.assert_array_equal(batch["images"], crops[chosen])
        np.testing.assert_array_equal(batch["counts"], dense[chosen])
    assert len(both.val_dataloader()) == len(val)
    assert sorted(flat(both.train_dataloader())) == both.parts.rows("train").tolist()


@pytest.mark.usefixtures("fork")  # for the preloaded server
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_goes_on_where_its_state_was_taken(store, workers):
    whole = module(store, num_workers=workers).train_dataloader()
    epochs = [rows_of(whole), rows_of(whole)]
    assert sorted(np.concatenate(epochs[0])) == sorted(np.concatenate(epochs[1]))
    assert epochs[0] != epochs[1]

    stopped = module(store, num_workers=workers).train_dataloader()
    for _ in zip(range(3), stopped, strict=False):
        pass
    assert stopped.state_dict() == {"epoch": 0, "start": 3}
    resumed = module(store, num_workers=workers).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert rows_of(resumed) == epochs[0][3:]
    assert resumed.state_dict() == {"epoch": 1, "start": 0}
    assert rows_of(resumed) == epochs[1]


def test_store_is_not_written_to(store):
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    flat(module(store).train_dataloader())
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == before
