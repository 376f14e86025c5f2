"""`phenoseq segment`: what it writes is what a folder of images is read with."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tifffile

from phenoseq.cli import main
from phenoseq.data.nuclei import segment_folder
from phenoseq.data.readers import open_source
from phenoseq.errors import DataError, PhenoseqWarning


def dna(n):
    y, x = np.mgrid[:60, :200]
    image = np.full((60, 200), 100, dtype=np.uint16)
    for k in range(n):
        image[np.hypot(y - 30, x - 20 - 30 * k) < 6] = 2000
    return image + np.random.default_rng(0).integers(0, 9, image.shape, dtype=np.uint16)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "p 1").mkdir(parents=True)
    for n, field in ((2, "A01"), (3, "p 1/é")):
        tifffile.imwrite(folder / f"{field}_DAPI.tif", dna(n), metadata=None)
        tifffile.imwrite(folder / f"{field}_ER.tif", dna(1), metadata=None)
    return folder


def test_command(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["segment", str(images), "-o", str(out), "--pixel-size", "1"]) == 0
    printed = capsys.readouterr().out
    assert "A01: 2 nuclei\np 1/é: 3 nuclei\n" in printed
    assert "5 nuclei in 2 fields" in printed
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert written == [
        "cells.csv", "masks/A01.tif", "masks/p 1/é.tif", "overlays/A01.png", "overlays/p 1/é.png",
    ]  # fmt: skip
    assert tifffile.imread(out / "masks" / "A01.tif").max() == 2
    assert main(["segment", str(images), "-o", str(out), "--pixel-size", "1"]) == 1
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize("drop", ["cells.csv", "masks", None])
def test_table_and_masks_are_read_as_the_same_cells(images, tmp_path, drop):
    with pytest.warns(PhenoseqWarning, match="5 nuclei were found"):
        found = open_source(images, pixel_size=1.0)
    segment_folder(images, images, pixel_size=1.0)
    if drop == "cells.csv":
        (images / drop).unlink()
    elif drop:
        (images / drop).rename(tmp_path / "away")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PhenoseqWarning)
        again = open_source(images, pixel_size=1.0)
    assert list(again.obs.index) == list(found.obs.index)
    columns = ["x_centroid", "y_centroid"]
    np.testing.assert_allclose(again.obs[columns], found.obs[columns])
    assert list(again.obs["field"]) == list(found.obs["field"])


def test_no_dna(images, tmp_path):
    for path in images.rglob("*_DAPI.tif"):
        path.unlink()
    with pytest.raises(DataError, match=r"no stain DNA .*\['ER'\]"):
        segment_folder(images, tmp_path / "out", pixel_size=1.0)


def test_nothing_is_left_of_a_failure(images, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise DataError("no")

    monkeypatch.setattr("phenoseq.data.nuclei.overlay", fail)
    with pytest.raises(DataError, match="no"):
        segment_folder(images, tmp_path / "out", pixel_size=1.0)
    assert list((tmp_path / "out").iterdir()) == []


def test_other_layouts(cellprofiler_folder, tmp_path, capsys):
    """The stain DNA of whatever a reader opens; its own cells are not asked."""
    fake = cellprofiler_folder(size=(60, 200), fields=(("P1", "B03", 1), ("P1", "B03", 2)))
    for n, field in ((2, "P1_B03_1"), (3, "P1_B03_2")):
        tifffile.imwrite(fake.images[field, "DNA"], dna(n))
    command = ["segment", str(fake.path), "-o", str(tmp_path / "out"), "--pixel-size", "1"]
    assert main([*command, "--format", "xenium"]) == 1
    assert "morphology_focus" in capsys.readouterr().err
    assert main([*command, "--format", "cellprofiler"]) == 0
    assert "P1_B03_1: 2 nuclei\nP1_B03_2: 3 nuclei\n" in capsys.readouterr().out
    assert tifffile.imread(tmp_path / "out/masks/P1_B03_2.tif").max() == 3
