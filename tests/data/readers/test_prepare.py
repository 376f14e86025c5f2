"""`phenoseq prepare` on every layout without counts, with the RNA from another file."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import sparse

from phenoseq.cli import main
from phenoseq.data.readers import open_source
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.store import Store

FIVE = tuple(("P1", f"B{k:02d}", 1) for k in range(1, 6))


def rna_of(obs, path):
    """Write 40 counts of a gene for each row of ``obs``, by symbol; the second says which row."""
    counts = np.full((len(obs), 2), 40, dtype=np.float32)
    counts[:, 1] = np.arange(len(obs))
    var = pd.DataFrame(index=["TP53", "CFAP276"])
    ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(path)
    return str(path)


def crops(size):
    return ["--crop-pixel-size", str(size), "--crop-px", "6"]


def test_omezarr_plate_behind_a_url_by_cell_id(tmp_path, fake, web, capsys):
    """One field is truncated: its cells are left out, with the reason; genes go by the list."""
    fake.plate(tmp_path / "p.zarr", wells=("A/1", "A/2", "B/3"))
    cells = open_source(tmp_path / "p.zarr").obs.index
    rna = rna_of(pd.DataFrame(index=cells[::-1]), tmp_path / "rna.h5ad")
    (tmp_path / "genes.txt").write_text("ENSG00000141510\nC1orf194\n")
    damaged = tmp_path / "p.zarr/A/2/1/0/1/1/1"
    damaged.write_bytes(damaged.read_bytes()[:20])
    store = tmp_path / "s.zarr"
    command = ["prepare", f"{web.url}/p.zarr", str(store), *crops(0.5), "--rna", rna]
    assert main([*command, "--genes", str(tmp_path / "genes.txt"), "--format", "ome-zarr"]) == 0
    out = capsys.readouterr()
    assert "cells paired by id: matched 54, only in images 0, only in RNA 0" in out.out
    assert "2 of 2 genes matched, 0 of them by symbol, 2 by HGNC's table" in out.out
    assert "left out, image that cannot be read: 9" in out.out
    assert "left out, plate 1-A02-s1 (9 cells): " in out.out
    assert "1 images cannot be read; 9 of 54 cells are left out" in out.err
    table = Store(store).table()
    assert table.n_obs == 45
    assert list(table.var_names) == ["ENSG00000141510", "C1orf194"]
    place = pd.Index(cells[::-1]).get_indexer(table.obs_names)
    np.testing.assert_array_equal(table.X.toarray()[:, 1], place)


def test_cell_painting_with_a_platemap_by_sample(tmp_path, cellprofiler_folder, cut_file, capsys):
    fake = cellprofiler_folder(fields=FIVE)
    cut_file(fake.images["P1_B04_1", "ER"], 0.5)
    wells = pd.DataFrame({"Metadata_Well": [f"b{k}" for k in range(1, 6)]})
    wells["Metadata_Treatment"] = ["DMSO", "DMSO", "drug é", "lost", "drug é"]
    wells.to_csv(tmp_path / "platemap.csv", index=False)
    obs = pd.DataFrame({"Metadata_Treatment": ["DMSO"] * 30 + ["drug é"] * 20})
    rna = rna_of(obs.set_axis([f"rna{k}" for k in range(50)]), tmp_path / "rna.h5ad")
    store = tmp_path / "s.zarr"
    command = ["prepare", str(fake.path), str(store), *crops(0.5), "--pixel-size", "0.5"]
    sample = ["--pair-by", "sample", "--sample-columns", "Metadata_Treatment", "--rna", rna]
    assert main([*command, *sample, "--metadata", str(tmp_path / "platemap.csv")]) == 0
    out = capsys.readouterr()
    assert "2 samples by Metadata_Treatment: 2 in both (16 image cells, 50 RNA cells)" in out.out
    assert "left out, P1_B04_1 (4 cells): " in out.out
    prepared = SampleStore(store)
    assert prepared.samples.index.tolist() == ["DMSO", "drug é"]
    assert set(prepared.image_obs()["Metadata_Well"]) == {"B01", "B02", "B03", "B05"}


def test_plain_folder_by_centroid(tmp_path, capsys):
    folder = tmp_path / "été 1"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for stain in ("DAPI", "ER"):
        pixels = rng.integers(0, 999, (60, 80), dtype=np.uint16)
        tifffile.imwrite(folder / f"feld 1_{stain}.tif", pixels, metadata=None)
    cells = pd.DataFrame({"x_centroid": [10.0, 30, 50, 20], "y_centroid": [10.0, 20, 30, 25]})
    ids = [str(2**60 + k) for k in range(4)]
    cells.assign(cell_id=ids).to_csv(folder / "cells.csv", index=False)
    shifted = pd.concat([cells + 0.5, cells[:1] + 9]).set_axis([f"rna{k}" for k in range(5)])
    rna = rna_of(shifted, tmp_path / "rna.h5ad")
    command = ["prepare", str(folder), str(tmp_path / "s.zarr"), *crops(1), "--pixel-size", "1"]
    assert main([*command, "--rna", rna, "--pair-by", "centroid", "--max-distance", "2"]) == 0
    out = capsys.readouterr().out
    assert "matched 4, only in images 0, only in RNA 1" in out
    assert "distance 0.71 um (median)" in out
    assert sorted(Store(tmp_path / "s.zarr").obs().index) == ids


@pytest.mark.parametrize("format", ["xenium", "jump", "merscope", "scgenescope", "spatialdata"])
def test_format_that_does_not_fit(cellprofiler_folder, tmp_path, format, capsys):
    command = ["prepare", str(cellprofiler_folder().path), str(tmp_path / "s.zarr")]
    assert main([*command, "--format", format, "--pixel-size", "0.5"]) == 1
    out = capsys.readouterr()
    assert f"read as {format}: as asked for" in out.out
    assert out.err.startswith("error: ")
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample-columns", "A"], "--sample-columns means nothing without --pair-by sample"),
        (["--embedding", "scGPT"], "--embedding means nothing without --pair-by sample"),
        (["--rna-values", "expression"], "--rna-values means nothing without --pair-by sample"),
        (["--genes", "g.txt"], "--genes means nothing without --rna RNA.h5ad"),
        (["--pair-by", "centroid"], "--pair-by means nothing without --rna RNA.h5ad"),
        (["--pair-by", "sample", "--max-distance", "5"], "--max-distance means nothing without"),
        (["--pair-by", "sample"], "pairing by sample needs the RNA: --rna RNA.h5ad"),
        ([], "no count matrix, .* RNA may come from another file"),
    ],
)
def test_options_that_would_be_passed_over(plate, tmp_path, capsys, options, message):
    folder = plate(1)
    assert main(["prepare", str(folder), f"{tmp_path}/s", "--pixel-size", "0.5", *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "s").exists()


def test_what_is_cheap_is_checked_before_the_images(plate, tmp_path, capsys):
    folder = str(plate(1))
    (tmp_path / "s").mkdir()
    assert main(["prepare", folder, f"{tmp_path}/s", "--pixel-size", "0.5"]) == 1
    assert main(["prepare", folder, f"{tmp_path}/t", "--rna", f"{tmp_path}/no.h5ad"]) == 1
    out = capsys.readouterr()
    assert "exists already and is no store" in out.err
    assert "no.h5ad: no such file" in out.err
    assert "read as" not in out.out


def test_features_are_paired_by_sample_and_images_may_have_anndata_beside_them(
    plate, tmp_path, capsys
):
    (tmp_path / "features").mkdir()
    rna = rna_of(pd.DataFrame(index=["a"]), tmp_path / "features" / "one.h5ad")
    command = ["prepare", str(tmp_path / "features"), f"{tmp_path}/s", "--rna", rna]
    assert main(command) == 1
    assert "a table of features, which is paired by sample" in capsys.readouterr().err
    folder = plate(2)
    wells = pd.DataFrame({"Metadata_Well": ["A01", "A02"]}, index=["r1", "r2"])
    rna = rna_of(wells, folder / "rna.h5ad")
    command = ["prepare", str(folder), f"{tmp_path}/s", "--pixel-size", "0.5", *crops(0.5)]
    by = ["--rna", rna, "--pair-by", "sample", "--sample-columns", "Metadata_Well"]
    assert main([*command, *by]) == 0
    assert "read as folder" in capsys.readouterr().out
    assert len(SampleStore(tmp_path / "s").samples) == 2
