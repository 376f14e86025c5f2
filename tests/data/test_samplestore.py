"""A sample store holds each sample's cells side by side, and a sample is on one side of a split."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import warnings
from dataclasses import asdict, replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from phenoseq.cli import main
from phenoseq.data import arrays as arrays_module
from phenoseq.data import csr as csr_module
from phenoseq.data import pairing as pairing_module
from phenoseq.data.backed import Cells
from phenoseq.data.samplestore import SampleManifest, SampleStore
from phenoseq.data.samplewriter import RnaConfig, write_sample_store
from phenoseq.data.source import Problem
from phenoseq.data.splits import UNASSIGNED, SplitConfig
from phenoseq.data.store import Store
from phenoseq.data.storewriter import write_store
from phenoseq.errors import DataError

COLUMNS = ["Treatment", "Replicate"]
BY_REPLICATE = SplitConfig(
    by="Replicate", block=None, declared={"train": ["3"], "val": ["5"], "test": ["4"]}
)
EMBEDDING = RnaConfig(embedding="scGPT")


def dense(rows):
    return rows.toarray() if sparse.issparse(rows) else rows


def written(path, images, rna, **options):
    return write_sample_store(images, rna, path, **{"columns": COLUMNS, **options})[0]


@pytest.fixture
def small_blocks(monkeypatch):
    """Read and write a few rows at a time."""
    monkeypatch.setattr(pairing_module, "BUDGET", 700)
    monkeypatch.setattr(arrays_module, "CHUNK", 8)
    monkeypatch.setattr(arrays_module, "SHARD", 32)
    monkeypatch.setattr(csr_module, "NNZ_CHUNK", 16)
    monkeypatch.setattr(csr_module, "NNZ_SHARD", 64)


# ------------------------------------------------------------------------------------ round trip


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("config", [RnaConfig(), EMBEDDING])
def test_features_and_rna(tmp_path, write, features, rna, config):
    images, other = features(), rna()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = written(
            tmp_path / "s.zarr",
            Cells(write(images, "images")),
            Cells(write(other, "rna", compression="gzip")),
            config=config,
        )
        store = SampleStore(store.path)
        obs, rna_obs = store.image_obs(), store.rna_obs()
    assert store.images.array.dtype == np.float32
    assert sorted(obs.index) == sorted(images.obs_names)
    assert sorted(rna_obs.index) == sorted(other.obs_names)
    np.testing.assert_array_equal(store.images.read(0, 300), images[obs.index].X.astype(np.float32))
    found = store.rna.read(0, 200)
    if config.embedding:
        np.testing.assert_array_equal(found, other[rna_obs.index].obsm["scGPT"])
    else:
        np.testing.assert_array_equal(found.toarray(), other[rna_obs.index].X.toarray())
        np.testing.assert_array_equal(store.rna.read(37, 41).toarray(), found[37:41].toarray())
    for name, column in images.obs.items():
        assert list(obs[name]) == list(column[obs.index])
    assert (
        obs["sample_key"] == obs["Treatment"].astype(str) + "|" + obs["Replicate"].astype(str)
    ).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("config", [RnaConfig(), EMBEDDING])
def test_tables_open_with_anndata_alone(tmp_path, features, rna, config):
    other = rna()
    store = written(tmp_path / "s.zarr", Cells(features()), Cells(other), config=config)
    table = ad.read_zarr(store.path / "rna")
    if config.embedding:
        np.testing.assert_array_equal(table.obsm["scGPT"], other[table.obs_names].obsm["scGPT"])
    else:
        np.testing.assert_array_equal(table.X.toarray(), other[table.obs_names].X.toarray())
        assert list(table.var_names) == list(other.var["gene_ids"])
        assert list(table.var["symbol"]) == list(other.var_names)
    assert ad.read_zarr(store.path / "table").shape == (300, 12)


def test_cells_of_a_sample_are_side_by_side_and_mixed(tmp_path, features, rna):
    images = features()
    images.obs["Replicate"] = "3"
    images.obs["Treatment"] = np.repeat(["DMSO", "drugA", "drugB"], 100)
    other = rna(replicates="3")
    store = written(tmp_path / "s.zarr", Cells(images), Cells(other))
    assert list(store.samples.index) == ["DMSO|3", "drugA|3", "drugB|3"]
    assert store.samples["image_start"].tolist() == [0, 100, 200]
    assert store.samples["image_stop"].tolist() == [100, 200, 300]
    obs, rna_obs = store.image_obs(), store.rna_obs()
    for name, sample in store.samples.iterrows():
        mine = slice(sample["rna_start"], sample["rna_stop"])
        assert set(rna_obs["sample_key"].iloc[mine]) == {name}
        assert len(rna_obs.iloc[mine]) == (rna_obs["sample_key"] == name).sum() > 0
    # some that stand side by side are a fair part of the sample
    was = store.images.read(0, 20)[:, 0]
    assert was.max() - was.min() > 50
    assert len(obs) == 300


def test_crops(tmp_path, ramp_source, rna):
    """Also where samples share a field, and cells at the border are left out."""
    source = ramp_source(400)
    rng = np.random.default_rng(0)
    source.obs["Treatment"] = rng.choice(["DMSO", "drugA", "lost"], 400)
    source.obs["Replicate"] = 3
    store = written(
        tmp_path / "s.zarr", source, Cells(rna(replicates="3")), pixel_size=0.5, crop_px=8
    )
    obs = store.image_obs()
    centre = np.floor(obs[["y_centroid", "x_centroid"]].to_numpy() / 0.5).astype(int) + 1000
    crops = store.images.read(0, len(obs))
    assert (np.abs(crops[:, :, 4, 4].astype(int) - centre) <= 1).all()
    assert obs["sample_key"].tolist() == sorted(obs["sample_key"])
    assert store.manifest.channels == ("DNA", "RNA")
    assert store.manifest.channel_stats["DNA"]["mean"] == pytest.approx(crops[:, 0].mean())
    left_out = store.manifest.excluded["images"]
    assert set(left_out) == {"cut by the border", "no sample of that name on the other side"}
    assert len(obs) + sum(left_out.values()) == 400
    np.testing.assert_array_equal(
        ad.read_zarr(store.path / "table").obsm["spatial"], obs[["x_centroid", "y_centroid"]]
    )


def test_what_is_left_out_is_told(tmp_path, features, rna):
    images, other = features(replicates="34"), rna(replicates="45")
    images.X[7, 3] = np.nan
    few = other.X.toarray()
    few[11] = 0
    other.X = sparse.csr_matrix(few)
    images.obs["Replicate"] = images.obs["Replicate"].where(images.obs_names != "image7", "4")
    other.obs["Replicate"] = other.obs["Replicate"].where(other.obs_names != "rna11", "4")
    store = written(tmp_path / "s.zarr", Cells(images), Cells(other))
    three, five = (images.obs.Replicate == "3").sum(), (other.obs.Replicate == "5").sum()
    elsewhere = "no sample of that name on the other side"
    assert store.manifest.excluded == {
        "images": {elsewhere: three, "values that are not finite": 1},
        "rna": {elsewhere: five, "fewer than 20 counts": 1},
    }
    excluded = ad.io.read_elem(store._group["excluded"])
    assert excluded["reason"]["image7"] == "values that are not finite"
    assert excluded["reason"]["rna11"] == "fewer than 20 counts"
    assert (excluded["of"] == "rna").sum() == five + 1
    assert len(store.image_obs()) == store.samples["image_stop"].iloc[-1] == 300 - three - 1
    assert "image7" not in store.image_obs().index
    assert len(store.rna_obs()) == store.rna.shape[0] == 200 - five - 1


def test_measured_genes_that_are_no_counts(tmp_path, features, rna):
    other = rna()
    other.X = other.X.log1p()
    with pytest.raises(DataError, match="not raw counts"):
        written(tmp_path / "s.zarr", Cells(features()), Cells(other))
    assert list(tmp_path.iterdir()) == []
    store = written(
        tmp_path / "s.zarr", Cells(features()), Cells(other), config=RnaConfig(values="expression")
    )
    assert store.manifest.rna == "expression"
    found = store.rna.read(0, 200).toarray()
    np.testing.assert_allclose(found, other[store.rna_obs().index].X.toarray(), rtol=1e-6)


def test_manifest(tmp_path, features, rna):
    store = written(tmp_path / "s.zarr", Cells(features()), Cells(rna()))
    raw = json.loads((store.path / "zarr.json").read_text())["attributes"]["phenoseq"]
    manifest = store.manifest
    assert manifest == SampleManifest.from_json(raw, "here")
    assert (manifest.pairing, manifest.images, manifest.rna) == ("sample", "features", "counts")
    assert manifest.sample_columns == ("Treatment", "Replicate")
    assert manifest.genes == tuple(f"ENSG{i:011d}" for i in range(9))
    embedded = written(tmp_path / "e.zarr", Cells(features()), Cells(rna()), config=EMBEDDING)
    assert embedded.manifest.identity == manifest.identity
    assert embedded.manifest.rna_identity != manifest.rna_identity
    assert (embedded.manifest.genes, embedded.manifest.min_counts) == ((), 0)
    changed = features()
    changed.X[250, 4] += 1
    other = written(tmp_path / "o.zarr", Cells(changed), Cells(rna()))
    assert other.manifest.identity != manifest.identity
    assert other.manifest.rna_identity == manifest.rna_identity
    assert manifest.identity == replace(manifest).identity


@pytest.mark.long
def test_memory_does_not_grow_with_the_rows(tmp_path, write, monkeypatch):
    """Features of several times the budget pass through it."""
    rng = np.random.default_rng(0)

    def table(n, prefix):
        obs = pd.DataFrame(
            {"well": rng.choice(list("ABCD"), n)}, [f"{prefix}{i}" for i in range(n)]
        )
        return ad.AnnData(rng.normal(size=(n, 500)), obs=obs)

    images, other = table(8000, "i"), table(50, "r")
    other.obsm["pca"] = other.X[:, :4]
    images = Cells(write(images, "images"))  # 32 MB
    monkeypatch.setattr(pairing_module, "BUDGET", 1 << 20)
    tracemalloc.start()
    written(tmp_path / "s.zarr", images, Cells(other), columns=["well"], config=RnaConfig("pca"))
    assert tracemalloc.get_traced_memory()[1] < 12e6
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "config",
    [
        BY_REPLICATE,
        SplitConfig(by="batch", block=None, test=0.34, val=0.34, cal=0),
        SplitConfig(by="Treatment", block=None, test=0.34, val=0.34, cal=0),
    ],
)
def test_no_group_on_two_sides(tmp_path, features, rna, config):
    """Neither of image cells nor of RNA cells nor between the two."""
    store = written(tmp_path / "s.zarr", Cells(features()), Cells(rna()))
    split = store.split(config)
    part = pd.Series(split.part, index=store.samples.index)
    seen = []
    for obs in (store.image_obs(), store.rna_obs()):
        group = obs[config.by].astype(str)
        seen.append(pd.DataFrame({"group": group, "part": part[obs["sample_key"]].to_numpy()}))
    both = pd.concat(seen)
    assert both.drop_duplicates()["group"].is_unique
    assert set(both["part"]) == {"train", "val", "test"}
    assert len(both) == 500


def test_groups_that_are_declared_nowhere(tmp_path, features, rna):
    replicates = {"replicates": "3456"}
    store = written(tmp_path / "s.zarr", Cells(features(**replicates)), Cells(rna(**replicates)))
    assert store.split(BY_REPLICATE).sizes() == {"train": 3, "val": 3, "test": 3, UNASSIGNED: 3}


def test_a_split_that_divides_samples_is_refused(tmp_path, features, rna):
    images, other = features(), rna()
    images.obs["donor"] = np.random.default_rng(0).choice(["a", "b"], 300)
    other.obs["donor"] = "a"
    store = written(tmp_path / "s.zarr", Cells(images), Cells(other))
    with pytest.raises(DataError, match=r"by 'donor': there is no such column that says one thing"):
        store.split(SplitConfig(by="donor", block=None))
    with pytest.raises(DataError, match="cannot be split by block"):
        store.split(SplitConfig())


# --------------------------------------------------------------------------- damage and mix-ups


def test_missing_files(tmp_path, features, rna):
    store = written(tmp_path / "s.zarr", Cells(features()), Cells(rna()))
    for name in ("features/c/0/0", "rna/X/data/c/0", "rna/X/indptr", "samples"):
        copy = shutil.copytree(store.path, tmp_path / name.replace("/", "_"))
        gone = copy / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with pytest.raises(DataError, match=rf"{name}: missing; the store is damaged"):
            SampleStore(copy)


def test_the_two_kinds_of_store_are_not_mixed_up(tmp_path, features, rna, ramp_source):
    store = written(tmp_path / "s.zarr", Cells(features()), Cells(rna()))
    with pytest.raises(DataError, match="pairs images and RNA by sample, not by cell"):
        Store(store.path)
    cell = write_store(ramp_source(80), tmp_path / "c.zarr", pixel_size=0.5, crop_px=8)
    with pytest.raises(DataError, match="by cell; open it with Store"):
        SampleStore(cell.path)
    with pytest.raises(DataError, match="no phenoseq store; make one with"):
        SampleStore(tmp_path / "nowhere.zarr")
    with pytest.raises(DataError, match="exists already; remove it, or use --overwrite"):
        written(tmp_path / "s.zarr", Cells(features()), Cells(rna()))
    written(tmp_path / "s.zarr", Cells(features()), Cells(rna()), config=EMBEDDING, overwrite=True)
    assert SampleStore(store.path).manifest.rna == "embedding"


def test_bad_rna_config():
    with pytest.raises(DataError, match="an embedding or a layer"):
        RnaConfig(embedding="scGPT", layer="counts")
    with pytest.raises(DataError, match="cannot be stored"):
        RnaConfig(embedding="a/b")


def test_problems_of_the_images_are_in_the_manifest(tmp_path, ramp_source, rna):
    problem = Problem("A03", "A03_ER.tif: truncated", 7)
    source = replace(ramp_source(), problems=(problem,))
    source.obs["Treatment"], source.obs["Replicate"] = "DMSO", 3
    other = Cells(rna(replicates="3"))
    store = written(tmp_path / "s.zarr", source, other, pixel_size=0.5, crop_px=8)
    assert store.manifest.problems == (asdict(problem),)


# ---------------------------------------------------------------------------------- command line


def test_prepare_by_sample(tmp_path, write, features, rna, capsys):
    images, other = write(features(), "images"), write(rna(), "rna")
    store, report = tmp_path / "s.zarr", tmp_path / "pairs.csv"
    command = ["prepare", str(images), str(store), "--pair-by", "sample", "--rna", str(other)]
    options = ["--sample-columns", "Treatment,Replicate", "--embedding", "scGPT"]
    assert main([*command, *options, "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert "9 samples by Treatment, Replicate: 9 in both (300 image cells, 200 RNA cells)" in out
    assert "300 image cells (features), 200 RNA cells (embedding of width 5)" in out
    assert pd.read_csv(report)["rna_cells"].sum() == 200
    assert SampleStore(store).manifest.embedding == "scGPT"
    again = [*command[:2], str(tmp_path / "again.zarr"), *command[3:5]]
    assert main([*again, "--sample-columns", "Treatment"]) == 1
    assert "needs the RNA: --rna" in capsys.readouterr().err


def test_prepare_by_id(tmp_path, write, xenium_set, capsys):
    cells = list(xenium_set.cells.index)
    counts = np.full((len(cells), 3), 30, dtype=np.float32)
    table = ad.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(index=cells),
        var=pd.DataFrame(index=["A", "B", "C"]),
    )
    (tmp_path / "genes.txt").write_text("C\nA\n")
    store = tmp_path / "s.zarr"
    command = ["prepare", str(xenium_set.path), str(store), "--crop-px", "8"]
    options = ["--rna", str(write(table, "rna")), "--genes", str(tmp_path / "genes.txt")]
    assert main([*command, *options]) == 0
    out = capsys.readouterr().out
    assert f"matched {len(cells)}, only in images 0" in out
    assert "2 of 2 genes matched" in out
    assert Store(store).manifest.genes == ("C", "A")
