"""Names of files say field, stain, plate, well and site, and never more than they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from phenoseq.data.readers.filenames import parse_name, read_channel_map
from phenoseq.errors import DataError

GUID = "2A3B4C5D-1234-4321-ABCD-0123456789AB"


@pytest.mark.parametrize(
    ("name", "field", "token", "metadata"),
    [
        ("r03c03f03p01-ch1sk1fk1fl1.tiff", "r03c03f03", "1", {"Well": "C03", "Site": "3"}),
        ("r16c24f12p01-ch10sk1fk1fl1.tiff", "r16c24f12", "10", {"Well": "P24", "Site": "12"}),
        ("r32c48f01p01-ch2sk1fk1fl1.tif", "r32c48f01", "2", {"Well": "AF48", "Site": "1"}),
        (
            "BR1__2020-11-02T19_54_45-Measurement1/Images/r01c02f01p01-ch3sk1fk1fl1.tiff",
            "BR1__2020-11-02T19_54_45-Measurement1/Images/r01c02f01",
            "3",
            {"Plate": "BR1", "Well": "A02", "Site": "1"},
        ),
        ("P_7_A01_s1_w1.tif", "P_7_A01_s1", "1", {"Plate": "P_7", "Well": "A01", "Site": "1"}),
        (f"P_b3_s02_w1{GUID}.tif", "P_b3_s02", "1", {"Plate": "P", "Well": "B03", "Site": "2"}),
        (f"P_b3_s02_w12{GUID}.tif", "P_b3_s02", "12", {"Plate": "P", "Well": "B03", "Site": "2"}),
        ("B2_A01_s1_w1.tif", "B2_A01_s1", "1", {"Plate": "B2", "Well": "A01", "Site": "1"}),
        ("a1_w2.TIF", "a1", "2", {"Well": "A01"}),
        ("a1_DAPI.tif", "a1", "DAPI", {"Well": "A01"}),
        ("a1_s3_Hoechst 33342.ome.tif", "a1_s3", "Hoechst 33342", {"Well": "A01", "Site": "3"}),
        ("tumour 4_ConA.tiff", "tumour 4", "ConA", {}),
        ("x/tumour_ER.tif", "x/tumour", "ER", {}),
        ("tumour_CD8.tif", "tumour", "CD8", {}),
        ("tumour_CD9.tif", "tumour_CD9", None, {}),
        ("DAPI.tif", "DAPI", None, {}),
        ("_DAPI.tif", "_DAPI", None, {}),
        ("NucleiOutlines_BR00143976_C03_3.tiff", "NucleiOutlines_BR00143976_C03_3", None, {}),
    ],
)
def test_names(name, field, token, metadata):
    found = parse_name(Path(name), known={"CD8"})
    assert (found.field, found.token) == (field, token)
    assert found.metadata == {f"Metadata_{key}": value for key, value in metadata.items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("channels.csv", "channel,stain\n1,DNA\n02, ConA\n7,\nCD8,CD8\n"),
        ("channels.json", '{"1": "DNA", "2": "ConA", "7": null, "CD8": "CD8"}'),
    ],
)
def test_channel_map(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_channel_map(tmp_path) == {"1": "DNA", "2": "ConA", "7": "", "CD8": "CD8"}


def test_no_channel_map(tmp_path):
    assert read_channel_map(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("channels.csv", "channel,stain\n1,DNA\n01,ER\n", r"says \['1'\] more than once"),
        ("channels.csv", "number,stain\n1,DNA\n", "cannot be read.*\nchannel,stain\n1,DNA"),
        ("channels.csv", "", "cannot be read"),
        ("channels.json", '["DNA"]', "cannot be read"),
        ("channels.json", "{", "cannot be read"),
    ],
)
def test_broken_channel_map(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        read_channel_map(tmp_path)


def test_two_channel_maps(tmp_path):
    (tmp_path / "channels.csv").write_text("channel,stain\n1,DNA\n")
    (tmp_path / "channels.json").write_text("{}")
    with pytest.raises(DataError, match="both"):
        read_channel_map(tmp_path)
