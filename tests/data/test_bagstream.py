"""Bags hold cells of one sample; every RNA cell comes once an epoch, on any number of readers."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy import sparse

from phenoseq.data import arrays as arrays_module
from phenoseq.data import bagstream as bagstream_module
from phenoseq.data import dataset as dataset_module
from phenoseq.data.backed import Cells
from phenoseq.data.bagstream import BagStream
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.samplewriter import RnaConfig, write_sample_store
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError

BY_REPLICATE = SplitConfig(
    by="Replicate", block=None, declared={"train": ["3"], "val": ["5"], "test": ["4"]}
)


def make(path, features, rna, config=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays_module, "CHUNK", 4)
        patch.setattr(arrays_module, "SHARD", 32)
        options = {"columns": ["Treatment", "Replicate"], "config": config or RnaConfig()}
        return write_sample_store(Cells(features), Cells(rna), path, **options)[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory, features, rna):
    return make(tmp_path_factory.mktemp("bags") / "s.zarr", features(), rna())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Divide also small samples."""
    monkeypatch.setattr(bagstream_module, "PIECE", 4)


@pytest.fixture
def stream(store):
    def make(**options):
        defaults = {"n_images": 6, "n_rna": 3, "batch_size": 5, "shuffle": True, "window": 3}
        return BagStream(store.path, np.arange(len(store.samples)), **{**defaults, **options})

    return make


def own(batches):
    return [row for batch in batches for row in batch["rows"][batch["keep_rna"]].tolist()]


def in_rank(monkeypatch, world, rank):
    monkeypatch.setattr(dataset_module, "_world", lambda: world)
    monkeypatch.setattr(dataset_module, "_rank", lambda: rank)


def as_worker(monkeypatch, workers, number):
    class Info:
        num_workers, id = workers, number

    monkeypatch.setattr(dataset_module, "get_worker_info", lambda: Info)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        assert all(torch.equal(a[key], b[key]) for key in a)


# -------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("n_rna", [1, 3, 50])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_rna_cell_once(stream, store, n_rna, shuffle):
    batches = list(stream(n_rna=n_rna, shuffle=shuffle))
    assert sorted(own(batches)) == list(range(store.rna.shape[0]))
    if n_rna == 1:
        assert all(batch["keep_rna"].all() for batch in batches)
        assert (own(batches) == sorted(own(batches))) is not shuffle
    sizes = {len(batch["sample"]) for batch in batches}
    assert max(sizes) <= 5
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("pool", [6, 256])
def test_bags_are_of_one_sample(stream, store, pool):
    """Values are those of the rows told, and the rows are of the sample told."""
    features, counts = store.images.read(0, 300), store.rna.read(0, 200).toarray()
    names = store.samples.index.to_numpy()
    image_key, rna_key = store.image_obs()["sample_key"], store.rna_obs()["sample_key"]
    for batch in stream(pool=pool):
        n = len(batch["sample"])
        assert batch["features"].shape == (n, 6, 12)
        assert batch["counts"].shape == (n, 3, 9)
        assert batch["features"].dtype == batch["counts"].dtype == torch.float32
        np.testing.assert_array_equal(batch["features"], features[batch["image_rows"]])
        np.testing.assert_array_equal(batch["counts"], counts[batch["rows"]])
        for i, sample in enumerate(batch["sample"].tolist()):
            assert set(image_key.iloc[batch["image_rows"][i].numpy()]) == {names[sample]}
            assert set(rna_key.iloc[batch["rows"][i].numpy()]) == {names[sample]}


def test_image_cells_are_drawn_without_replacement(stream, store):
    batches = list(stream(n_rna=1))
    rows = torch.cat([batch["image_rows"] for batch in batches])
    assert all(len(set(bag)) == 6 for bag in rows.tolist())
    assert torch.cat([batch["keep"] for batch in batches]).all()
    # all cells get their turn, and bags of one sample differ
    assert len(rows.unique()) > 0.9 * len(store.images)
    assert len({tuple(bag) for bag in rows.tolist()}) == len(rows)


def test_short_samples_are_filled(tmp_path, features, rna):
    images = features(replicates="3")
    few = images.obs["Treatment"].to_numpy() == "drugA"
    few[np.flatnonzero(few)[:4]] = False  # keep four
    store = make(tmp_path / "s.zarr", images[~few].copy(), rna(replicates="3"))
    sample = store.samples.index.get_loc("drugA|3")
    batches = list(
        BagStream(store.path, np.array([sample]), n_images=7, n_rna=5, batch_size=3, shuffle=True)
    )
    for batch in batches:
        assert batch["keep"].tolist() == [[True] * 4 + [False] * 3] * len(batch["keep"])
        for bag in batch["image_rows"].tolist():
            assert len(set(bag[:4])) == 4
            assert set(bag[4:]) <= set(bag[:4])
    fills = torch.cat([batch["keep_rna"].sum(1) for batch in batches])
    n = int(store.samples["rna_stop"].iloc[sample] - store.samples["rna_start"].iloc[sample])
    assert fills.sum() == n
    assert n % 5
    assert sorted(set(fills.tolist())) == [n % 5, 5]


def test_a_pool_of_some_chunks(stream, store):
    """Image cells in memory at once are few, and change with the epoch."""
    pools = []
    for epoch in (0, 1):
        one = stream(pool=8, n_images=2)
        one.epoch = epoch
        of = {}
        for batch in one:
            for rows, bag in zip(batch["rows"], batch["image_rows"], strict=True):
                of.setdefault(int(rows.min()) // 12, set()).update(bag.tolist())
        pools.append(of)
    assert pools[0] != pools[1]
    one = stream(pool=8, n_images=2)
    loaded = one._load(store, 0)
    assert 8 <= len(loaded.images) < 8 + 2 * store.images.chunk


def test_embeddings_and_crops(tmp_path, ramp_source, rna):
    source = ramp_source(300)
    source.obs["Treatment"], source.obs["Replicate"] = "DMSO", "3"
    store, _ = write_sample_store(
        source,
        Cells(rna(replicates="3")),
        tmp_path / "s.zarr",
        columns=["Treatment", "Replicate"],
        config=RnaConfig(embedding="scGPT"),
        pixel_size=0.5,
        crop_px=8,
    )
    batch = next(iter(BagStream(store.path, np.array([0]), n_images=3, batch_size=4, shuffle=True)))
    assert batch["images"].shape == (4, 3, 2, 8, 8)
    assert batch["images"].dtype == torch.uint16
    np.testing.assert_array_equal(
        batch["images"][0], store.images.take(batch["image_rows"][0].numpy())
    )
    assert batch["embedding"].shape == (4, 1, 5)
    whole = store.rna.read(0, store.rna.shape[0])
    np.testing.assert_array_equal(batch["embedding"], whole[batch["rows"]])


# ----------------------------------------------------------------------------------------- order


def test_order_depends_on_seed_and_epoch_alone(stream):
    def order(seed, epoch):
        one = stream(seed=seed)
        one.epoch = epoch
        return list(one)

    same(order(0, 0), order(0, 0))
    orders = [tuple(own(order(*words))) for words in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3


def test_samples_are_mixed(stream):
    mixed = [len(set(batch["sample"].tolist())) for batch in stream(batch_size=16)]
    assert np.mean(mixed) > 2


def test_bags_do_not_depend_on_the_reader(stream, monkeypatch):
    def bags(world, workers):
        found = {}
        for rank, number in itertools.product(range(world), range(workers)):
            in_rank(monkeypatch, world, rank)
            one = stream(workers=workers)
            as_worker(monkeypatch, workers, number)
            for batch in one:
                for i, rows in enumerate(batch["rows"].tolist()):
                    assert tuple(rows) not in found
                    found[tuple(rows)] = batch["image_rows"][i].tolist()
        return found

    alone = bags(1, 1)
    assert bags(3, 2) == alone


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("window", [1, 3, 50])
def test_every_rna_cell_once_over_all_readers(stream, store, monkeypatch, world, workers, window):
    seen, lengths = [], set()
    for rank, number in itertools.product(range(world), range(workers)):
        in_rank(monkeypatch, world, rank)
        one = stream(workers=workers, window=window)
        as_worker(monkeypatch, workers, number)
        batches = list(one)
        lengths.add(len(batches))
        assert len(batches) * workers == len(one)
        seen += own(batches)
    assert sorted(seen) == list(range(store.rna.shape[0]))
    assert len(lengths) == 1


@pytest.mark.parametrize("start", [1, 4, 7, 11])
@pytest.mark.parametrize(("window", "batch_size"), [(1, 5), (2, 16), (50, 2)])
def test_goes_on_where_it_stopped(stream, start, window, batch_size):
    whole = list(stream(window=window, batch_size=batch_size))
    start = min(start, len(whole) - 1)
    rest = stream(window=window, batch_size=batch_size)
    rest.start = start
    same(list(rest), whole[start:])


def test_leaving_out_reads_nothing(stream, monkeypatch):
    loads = []
    load = BagStream._load
    monkeypatch.setattr(BagStream, "_load", lambda *args: loads.append(args[2]) or load(*args))
    one = stream(window=1, batch_size=16)
    total = len(list(one))
    everything = len(loads)
    assert everything == len(set(loads)) == len(one._pieces)
    loads.clear()
    one.start = total - 1
    assert len(list(one)) == 1
    assert len(loads) <= everything / 3


def test_memory_is_a_window_of_pieces(stream, monkeypatch):
    alive, most = set(), []
    loaded = bagstream_module._Loaded

    class Counted(loaded):
        def __init__(self, **fields):
            super().__init__(**fields)
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr(bagstream_module, "_Loaded", Counted)
    list(stream(window=2, batch_size=9))
    assert max(most) <= 2 + 2  # those of a window, while the next is read


# -------------------------------------------------------------------------------------- modules


def module(store, **options):
    found = SampleDataModule(
        store.path, BY_REPLICATE, **{"n_images": 4, "n_rna": 2, "batch_size": 6, **options}
    )
    found.setup()
    return found


def test_module_streams_its_part(store):
    data = module(store)
    for loader, part in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        samples = set(data.parts.rows(part).tolist())
        batches = list(loader)
        assert {s for batch in batches for s in batch["sample"].tolist()} == samples
        expected = [
            row
            for sample in samples
            for row in range(*store.samples[["rna_start", "rna_stop"]].iloc[sample])
        ]
        assert sorted(own(batches)) == sorted(expected)
    same(list(data.val_dataloader()), list(data.val_dataloader()))
    train = data.train_dataloader()
    assert own(list(train)) != own(list(train))  # the next epoch
    few = list(module(store, max_val=12).val_dataloader())
    assert len(own(few)) == 12


def test_module_goes_on_in_the_middle(store):
    loader = module(store).train_dataloader()
    list(loader)
    second = iter(loader)
    next(second)
    state = loader.state_dict()
    assert state == {"epoch": 1, "start": 1}
    rest = list(second)
    again = module(store).train_dataloader()
    again.load_state_dict(state)
    same(list(again), rest)


def test_a_stream_can_be_sent_to_a_worker(stream):
    one = stream()
    same(list(pickle.loads(pickle.dumps(one))), list(one))


def test_module_draws_for_statistics(store):
    data = module(store)
    train = data.parts.rows("train")
    image_rows = np.concatenate(
        [np.arange(*store.samples[["image_start", "image_stop"]].iloc[s]) for s in train]
    )
    drawn = data.image_sample("train", 10)
    assert drawn.shape == (10, 12)
    there = store.images.take(image_rows)
    assert all((row == there).all(axis=1).any() for row in drawn)
    np.testing.assert_array_equal(data.image_sample("train", 10**6), there)
    assert sparse.issparse(data.rna_sample("train", 20))
    rna, everything = (data.rna_sample("train", n).toarray() for n in (20, 10**6))
    assert 20 <= len(rna) <= 20 + len(train)
    assert set(rna[:, 0]) <= set(everything[:, 0])
    assert (
        len(everything)
        == data.n_cells("train")
        == sum(np.diff(store.samples[["rna_start", "rna_stop"]].iloc[s])[0] for s in train)
    )


def test_too_few_bags(stream, monkeypatch):
    in_rank(monkeypatch, 60, 0)
    with pytest.raises(DataError, match=r"bags cannot be shared by 60 readers"):
        len(stream(n_rna=50, batch_size=1))


def test_module_state_is_where_training_is(store):
    """As a checkpoint holds it: another datamodule goes on in the middle, then with the next."""
    data = module(store)
    loader = data.train_dataloader()
    list(loader)
    second = iter(loader)
    next(second)
    state = data.state_dict()
    assert state == {"data": data.digest, "epoch": 1, "start": 1}
    rest, third = list(second), list(loader)
    again = module(store)
    assert again.state_dict() == {}
    again.load_state_dict(state)
    loader = again.train_dataloader()
    same(list(loader), rest)
    same(list(loader), third)


def test_a_part_can_be_given_to_one_rank_alone(store, monkeypatch):
    whole = [batch["rows"] for batch in module(store).fixed("val", 10**6)]
    in_rank(monkeypatch, 2, 1)
    data = module(store)
    share = [batch["rows"] for batch in data.fixed("val", 10**6)]
    assert 0 < sum(map(len, share)) < sum(map(len, whole))
    alone = [batch["rows"] for batch in data.fixed("val", 10**6, alone=True)]
    assert torch.equal(torch.cat(alone), torch.cat(whole))
