"""A field that cannot be read is left out of a prediction, told and recorded, and no crash."""

from __future__ import annotations

import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest

import phenoseq
from phenoseq.data.source import FieldImage, Level
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference import predictor
from phenoseq.inference.predictor import image_job


def damage(source, *fields):
    """Let some fields of a source fail when their pixels are read."""

    def broken(level, field):
        def read(y0, y1, x0, x1):
            raise DataError(f"{field}.tif: not a readable TIFF (truncated); copy it again")

        return Level(level.pixel_size, level.shape, read)

    images = {
        name: FieldImage(tuple(broken(level, name) for level in image.levels), image.dtype)
        if name in fields
        else image
        for name, image in source.fields.items()
    }
    return replace(source, fields=images)


@pytest.fixture
def few_lost(plate):
    """The plate with two cells of its second field, which is broken."""
    names = list(plate.source.fields)
    rows = np.arange(80)
    kept = (plate.source.obs["field"] != names[1]).to_numpy() | np.isin(rows, [21, 25])
    return damage(replace(plate.source, obs=plate.source.obs[kept]), names[1]), names[1]


@pytest.mark.parametrize("out", [None, "out.h5ad", "out.zarr"])
def test_a_field_that_breaks_while_it_is_read(
    model, few_lost, predicted, tmp_path, out, monkeypatch
):
    monkeypatch.setattr(predictor, "_BLOCK", 1)
    monkeypatch.setitem(image_job.__kwdefaults__, "batch_size", 16)
    source, field = few_lost
    path = None if out is None else tmp_path / out
    with pytest.warns(PhenoseqWarning, match=rf"2 rows are left out \(recorded in uns\): {field}"):
        got = phenoseq.predict(source, model=model, n_samples=4, seed=11, device="cpu", out=path)
    got = got.to_memory()
    lost = source.obs.index[source.obs["field"] == field]
    assert list(got.obs_names) == list(source.obs.index.drop(lost))
    assert got.obsm["spatial"].shape == (60, 2)
    np.testing.assert_allclose(got.X, predicted[got.obs_names].X, atol=2e-5)
    np.testing.assert_allclose(got.obs["ood_score"], predicted[got.obs_names].obs["ood_score"],
                               rtol=1e-4)  # fmt: skip
    draws = (x.layers["draw"].toarray() for x in (got, predicted[got.obs_names]))
    assert np.abs(np.subtract(*draws)).max(axis=1).mean() < 0.1
    record = got.uns["phenoseq"]
    assert list(record["skipped_cells"]) == list(lost)
    (problem,) = record["problems"]
    assert problem.startswith(f"{field}: {field}.tif: not a readable TIFF")
    if path is not None:
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        read = ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)
        assert read.shape == (60, 60)


def test_too_many_stop_the_run(model, plate, tmp_path):
    names = list(plate.source.fields)
    source = damage(plate.source, *names[:2])
    for out in (None, tmp_path / "out.h5ad"):
        with pytest.raises(DataError, match=r"of 80 rows cannot be predicted, and at most 20%"):
            phenoseq.predict(source, model=model, n_samples=1, device="cpu", out=out)
    assert not (tmp_path / "out.h5ad").exists()


def test_intensity_scale_of_the_fields_that_can_be_read(model, few_lost):
    source, field = few_lost
    eight = {
        name: FieldImage(
            tuple(
                Level(level.pixel_size, level.shape,
                      lambda *box, level=level: (level.read(*box) // 257).astype(np.uint8))
                for level in image.levels
            ),
            np.dtype(np.uint8),
        )
        for name, image in source.fields.items()
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = replace(source, fields=eight)
        got = phenoseq.predict(source, model=model, n_samples=1, device="cpu")
        assert got.n_obs == 60
        lost = replace(source, obs=source.obs[source.obs["field"] == field])
        with pytest.raises(DataError, match="not a readable TIFF"):
            phenoseq.predict(lost, model=model, device="cpu")
