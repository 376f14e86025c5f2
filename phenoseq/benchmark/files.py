"""The files of scGeneScope, and which of their cells the benchmark is about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phenoseq.data.backed import Cells
from phenoseq.data.pairing import sample_names
from phenoseq.data.readers.scgenescope import PROTOCOL
from phenoseq.errors import DataError

Rows = NDArray[np.int64]

#: Columns that together name a sample, and the treatment that is left out.
COLUMNS, CONTROL = ("Treatment", "Replicate"), "DMSO"
#: Column of ``obs`` that names a cell's sample.
SAMPLE = "phenoseq_sample"


@dataclass(frozen=True)
class ScGeneScope:
    """The files of the benchmark, and which of their cells it is about.

    Attributes
    ----------
    folder
        Folder of the data.
    imaging, rna
        Folders of ``round_1.h5ad`` and ``round_2.h5ad`` below ``features/imaging`` and
        ``features/rnaseq``.
    embedding
        Name in ``obsm`` of the RNA files.
    """

    folder: Path
    imaging: str = "imagenet/vit-l"
    rna: str = "scgpt"
    embedding: str = "scGPT"

    @cached_property
    def images(self) -> Cells:
        """Cells with image features in ``X``."""
        return self._open(self.folder / "features" / "imaging" / self.imaging)

    @cached_property
    def sequenced(self) -> Cells:
        """Cells with RNA."""
        return self._open(self.folder / "features" / "rnaseq" / self.rna)

    def _open(self, place: Path) -> Cells:
        if not place.is_dir() or not any(place.glob("*.h5ad")):
            raise DataError(
                f"{place}: no .h5ad file there; put scGeneScope's round_1.h5ad and round_2.h5ad "
                "there, or name what you have with --imaging and --rna"
            )
        cells = Cells(place)
        cells.obs[SAMPLE] = sample_names(cells.obs, COLUMNS, cells.name)
        return cells

    @cached_property
    def part(self) -> NDArray[np.str_]:
        """Part of each image cell, by its replicate; empty where it is not used."""
        assert PROTOCOL.declared is not None
        part_of = {name: part for part, names in PROTOCOL.declared.items() for name in names}
        obs = self.images.obs
        part = obs["Replicate"].astype(str).map(part_of).fillna("").to_numpy(dtype=str)
        has_rna = obs[SAMPLE].isin(self.sequenced.obs[SAMPLE].unique()).to_numpy()
        used = (obs["Treatment"].astype(str) != CONTROL).to_numpy() & has_rna
        return np.where(used, part, "")

    @cached_property
    def cells(self) -> Rows:
        """Rows of the image cells that are used."""
        rows = np.flatnonzero(self.part != "")
        missing = set(PROTOCOL.declared or ()) - set(self.part[rows].tolist())
        if missing:
            raise DataError(
                f"{self.folder}: no treated cells with RNA in the parts {sorted(missing)}; the "
                f"protocol needs the replicates {PROTOCOL.declared}"
            )
        return rows

    def left_out(self) -> dict[str, int]:
        """Return the number of treated image cells of samples without RNA, by sample."""
        obs = self.images.obs
        out = (self.part == "") & (obs["Treatment"].astype(str) != CONTROL).to_numpy()
        return {str(k): int(v) for k, v in obs.loc[out, SAMPLE].value_counts().items()}
