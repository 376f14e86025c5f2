"""What another table says of cells and wells is added; of what it does not tell is told."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from phenoseq.cli import main
from phenoseq.data.metadata import add_metadata, read_metadata
from phenoseq.data.store import Store
from phenoseq.errors import DataError, PhenoseqWarning


@pytest.fixture
def plate(ramp_source):
    """Give 60 cells, whose wells are A01 to A06 in turn."""
    source = ramp_source(60)
    wells = [f"A{1 + k % 6:02d}" for k in range(60)]
    return replace(source, obs=source.obs.assign(Metadata_Plate="P1", Metadata_Well=wells))


def platemap(wells, **columns):
    return pd.DataFrame({"Metadata_Well": wells, **columns})


def test_wells(plate, tmp_path):
    """Names of wells may be written in another way; ids and numbers stay text."""
    wells = ["a1", "A2", "A/03", "A-04", "A05", "A06"]
    table = platemap(wells, Metadata_Dose=[f"0{k}" for k in range(6)], Metadata_Treatment="drug é")
    table.to_csv(tmp_path / "platemap.csv", index=False)
    found = add_metadata(plate, read_metadata(tmp_path / "platemap.csv"), "platemap.csv")
    assert found.obs["Metadata_Dose"].tolist() == [f"0{k % 6}" for k in range(60)]
    assert found.obs["Metadata_Well"].tolist() == plate.obs["Metadata_Well"].tolist()
    assert found.identity == plate.identity
    assert not found.problems
    table.to_parquet(tmp_path / "platemap.parquet")
    again = add_metadata(plate, read_metadata(tmp_path / "platemap.parquet"), "p")
    pd.testing.assert_frame_equal(again.obs, found.obs)


def test_wells_missing_from_the_metadata(plate):
    table = platemap(["A01", "A02", "A03", "A04", "A05", "H12"], Metadata_Treatment="x")
    with pytest.warns(PhenoseqWarning) as caught:
        found = add_metadata(plate, table, "platemap.csv")
    said = " ".join(str(one.message) for one in caught)
    assert "1 of 6 wells cannot be used and are left out, with 10 cells" in said
    assert "1 of 6 wells are not in ramp" in said
    assert len(found.obs) == 50
    (problem,) = found.problems
    assert (problem.where, problem.cells) == ("A06", 10)
    assert "no well of that name in platemap.csv" in problem.reason
    assert found.identity != plate.identity
    np.testing.assert_array_equal(
        found.counts.toarray(), plate.counts.toarray()[plate.obs["Metadata_Well"] != "A06"]
    )
    with pytest.raises(DataError, match="2 of 6 wells cannot be used, more than 20%"):
        add_metadata(plate, table.iloc[:4], "platemap.csv")


def test_wells_of_several_plates(plate):
    two = replace(plate, obs=plate.obs.assign(Metadata_Plate=["P1", "P2"] * 30))
    table = platemap([f"A{k:02d}" for k in range(1, 7)], dose="1")
    with pytest.raises(DataError, match=r"no 'Metadata_Plate', but ramp is of 2 plates"):
        add_metadata(two, table, "p.csv")
    both = pd.concat([table.assign(Metadata_Plate=p, dose=p[1]) for p in ("P1", "P2")])
    odd = both["Metadata_Well"].isin(["A01", "A03", "A05"])
    found = add_metadata(two, both[odd == (both["dose"] == "1")], "p.csv")
    assert found.obs["dose"].tolist() == ["1", "2"] * 30


def test_cells(plate, tmp_path):
    """A table of cells: 64-bit ids are text, its positions are not taken."""
    ids = [str(2**60 + k) for k in range(60)]
    source = replace(plate, obs=plate.obs.set_axis(pd.Index(ids, name="cell_id")))
    table = pd.DataFrame({"cell_id": ids[:59], "x_centroid": -1.0, "Treatment": ids[:59]})
    table.iloc[::-1].to_csv(tmp_path / "c.csv", index=False)
    with pytest.warns(PhenoseqWarning, match=r"c\.csv: does not tell of 1 cells, such as"):
        found = add_metadata(source, read_metadata(tmp_path / "c.csv"), "c.csv")
    assert found.obs["Treatment"].tolist() == ids[:59]
    assert (found.obs["x_centroid"] > 0).all()
    assert [(p.where, p.cells) for p in found.problems] == [("c.csv", 1)]
    ad.AnnData(obs=pd.DataFrame({"batch": "b"}, index=ids)).write_h5ad(tmp_path / "c.h5ad")
    found = add_metadata(source, read_metadata(tmp_path / "c.h5ad"), "c.h5ad")
    assert set(found.obs["batch"]) == {"b"}


def test_tables_that_cannot_be_used(plate, tmp_path):
    (tmp_path / "a.csv").write_text("Well,dose\nA01,1\n")
    with pytest.raises(DataError, match="neither 'cell_id' nor 'Metadata_Well'"):
        read_metadata(tmp_path / "a.csv")
    with pytest.raises(DataError, match="not a readable table"):
        read_metadata(tmp_path / "none.csv")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable table"):
        read_metadata(tmp_path / "b.parquet")
    wells = [f"A{k:02d}" for k in range(1, 7)]
    with pytest.raises(DataError, match=r"tells of wells twice, e\.g\. \['A01'\]"):
        add_metadata(plate, platemap([*wells, "a1"]), "p.csv")
    with pytest.raises(DataError, match="tells of none of the wells"):
        add_metadata(plate, platemap(["P24"]), "p.csv")
    bare = replace(plate, obs=plate.obs.drop(columns="Metadata_Well"))
    with pytest.raises(DataError, match="have no 'Metadata_Well'"):
        add_metadata(bare, platemap(wells), "p.csv")


def test_prepare_with_metadata(xenium_set, tmp_path, capsys):
    cells = pd.DataFrame({"cell_id": xenium_set.cells.index[:40], "Metadata_Donor": "d1"})
    cells.to_csv(tmp_path / "donors.csv", index=False)
    command = ["prepare", str(xenium_set.path), str(tmp_path / "s.zarr"), "--crop-px", "8"]
    assert main([*command, "--metadata", str(tmp_path / "donors.csv")]) == 0
    out = capsys.readouterr()
    assert "40 cells of" in out.out
    assert "(8 cells): does not tell of 8 cells" in out.out
    assert set(Store(tmp_path / "s.zarr").obs()["Metadata_Donor"]) == {"d1"}
