"""TIFF read by region: in memory that does not grow with the image, and from its own folder."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import tifffile

from phenoseq.data.readers.ometiff import open_ometiff, open_stains
from phenoseq.errors import DataError


def write(path, image, **options):
    tifffile.imwrite(path, image, photometric="minisblack", metadata=None, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 8192},
        {"rowsperstrip": 16},
        {"rowsperstrip": 16, "compression": "zlib", "compressionargs": {"level": 1}},
        {"tile": (256, 256), "bigtiff": True},
    ],
    ids=["one strip", "strips", "compressed strips", "tiles"],
)
def test_memory_of_a_region_does_not_grow_with_the_image(tmp_path, options):
    """The image is 128 MiB, the region 0.5 MiB."""
    image = np.add.outer(np.arange(8192, dtype=np.uint16), np.arange(8192, dtype=np.uint16))
    path = write(tmp_path / "a.tif", image, **options)
    tracemalloc.start()
    level = open_stains({"DAPI": path}).field(0.1).levels[0]
    region = level.read(5000, 5512, 7000, 7512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(region[0], image[5000:5512, 7000:7512])
    assert peak < 8e6, peak


def test_names_are_those_given_whatever_the_files_say(tmp_path):
    paths = {}
    for k, stain in enumerate(("Hoechst", "ConA")):
        paths[stain] = tmp_path / f"{k}.ome.tif"
        metadata = {"axes": "YX", "Channel": {"Name": "Channel 0"}, "PhysicalSizeX": 0.5}
        tifffile.imwrite(paths[stain], np.full((8, 9), k + 5, np.uint8), metadata=metadata)
    image = open_stains(paths)
    assert image.channels == ("DNA", "ER")
    assert image.pixel_size == 0.5
    np.testing.assert_array_equal(image.field(0.5).levels[0].read(0, 8, 0, 9)[:, 0, 0], [5, 6])


@pytest.mark.parametrize("shape", [(3, 16, 17), (16, 17, 3)])
def test_one_plane_a_stain(tmp_path, shape):
    photometric = "rgb" if shape[-1] == 3 else "minisblack"
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros(shape, np.uint8), photometric=photometric)
    with pytest.raises(DataError, match=r"a\.tif: .*where one plane of one stain is expected"):
        open_stains({"DNA": path})


@pytest.mark.parametrize("name", ["../secret.ome.tif", "/etc/secret.ome.tif"])
def test_set_that_names_files_outside_its_folder(tmp_path, name):
    """No file is looked for where an image says, outside of the folder that was given."""
    folder = tmp_path / "images"
    folder.mkdir()
    write(tmp_path / "secret.ome.tif", np.ones((16, 16), np.uint8))
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="16" '
        'SizeY="16" SizeC="2" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" Name="DNA"/>'
        '<Channel ID="Channel:0:1" Name="ER"/><TiffData FirstC="0" IFD="0" PlaneCount="1"/>'
        f'<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:1</UUID>'
        "</TiffData></Pixels></Image></OME>"
    )
    path = folder / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8), description=xml, metadata=None)
    with pytest.raises(DataError, match=r"a\.ome\.tif: says that .*outside its folder"):
        open_ometiff([path])
