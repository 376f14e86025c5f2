"""A window gives the crops and counts of its cells, whatever was there before."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec

from phenoseq.data import arrays as arrays_module
from phenoseq.data import csr as csr_module
from phenoseq.data.store import Store
from phenoseq.data.storewriter import write_store
from phenoseq.data.window import Window


@pytest.fixture(scope="module")
def store(tmp_path_factory, ramp_source):
    path = tmp_path_factory.mktemp("window") / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (arrays_module, "CHUNK", 16),
            (arrays_module, "SHARD", 64),
            (csr_module, "NNZ_CHUNK", 32),
            (csr_module, "NNZ_SHARD", 128),
        ):
            patch.setattr(module, name, value)
        return write_store(ramp_source(400), path, pixel_size=0.5, crop_px=8)


@pytest.fixture(scope="module")
def truth(store):
    return store.crops[:], store.table().X.toarray()


def check(window, rows, truth):
    images = np.ones((len(rows), *truth[0].shape[1:]), truth[0].dtype)
    counts = np.ones((len(rows), truth[1].shape[1]), np.float32)
    window.gather(rows, images, counts)
    np.testing.assert_array_equal(images, truth[0][rows])
    np.testing.assert_array_equal(counts, truth[1][rows])


@pytest.mark.parametrize("room", [1, 1000])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.9, 1.0])
def test_cells_come_and_go(store, truth, room, share):
    """Also where few cells of a chunk are wanted, and where there is less room than cells."""
    rng = np.random.default_rng(0)
    window = Window(store, room)
    rows = rng.permutation(np.flatnonzero(rng.random(len(store)) < share))
    here = np.empty(0, dtype=np.int64)
    for some in np.array_split(rows, 7):
        window.load(some)
        here = rng.permutation(np.concatenate([here, some]))
        check(window, here, truth)
        gone, here = np.split(here, [len(here) // 2])
        check(window, gone, truth)
        window.forget(gone)
        check(window, here, truth)
    window.forget(here)
    check(window, here[:0], truth)


def test_stores_of_earlier_versions(tmp_path, store, truth):
    """Crops by blosc, also of bytes, and counts as anndata lays them out by itself."""
    crops = (truth[0] % 251).astype(np.uint8)
    group = zarr.create_group(tmp_path / "old.zarr", zarr_format=3)
    rest = crops.shape[1:]
    array = group.create_array(
        "crops",
        shape=crops.shape,
        chunks=(16, *rest),
        shards=(64, *rest),
        dtype=crops.dtype,
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
    )
    array[:] = crops
    with ad.settings.override(zarr_write_format=3):
        ad.io.write_elem(group, "table", store.table())
        ad.io.write_elem(group, "excluded", store.obs().iloc[:0])
    group.attrs.update(zarr.open_group(store.path, mode="r").attrs.asdict())
    old = Store(tmp_path / "old.zarr")
    rows = np.arange(5, 90)
    window = Window(old, 100)
    window.load(rows)
    check(window, rows, (crops, truth[1]))
    np.testing.assert_array_equal(old.counts(rows[::-1]).toarray(), truth[1][rows[::-1]])
