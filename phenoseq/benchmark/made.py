"""What the arms of the benchmark read, made once and kept in files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import zarr
from numpy.typing import NDArray

from phenoseq.benchmark.files import SAMPLE, ScGeneScope
from phenoseq.data.backed import Matrix, dense
from phenoseq.data.bags import Bags, make_bags
from phenoseq.data.pairing import blocks
from phenoseq.disk import room_for
from phenoseq.errors import DataError
from phenoseq.inference.bagged import bag_job
from phenoseq.inference.samples import sample_job
from phenoseq.inference.table import predict_file
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.progress import bar
from phenoseq.training.perceptron import Modality

Rows = NDArray[np.int64]


class Made:
    """What the arms read, made once and kept in files that are memory-mapped."""

    def __init__(
        self,
        data: ScGeneScope,
        model: PublishedPhenoSeq | SamplePhenoSeq,
        work: Path,
        seed: int,
        device: torch.device,
    ) -> None:
        self.data, self.model, self.work = data, model, work
        self.seed, self.device = seed, device
        images, cells = data.images, data.cells
        self.bags: Bags = make_bags(
            images.obs, SAMPLE, size=model.config.bag_size, seed=seed, where=images.name
        )
        bag, self._place = (of[cells] for of in self.bags.owners())
        #: Bags of the cells used, and which of these each cell is one of.
        self.used, self.bag_of_cell = np.unique(bag, return_inverse=True)

    def images(self) -> NDArray[np.float32]:
        """Return the image features of each cell."""
        matrix = self.data.images.matrix("X")
        return self._copied("imaging", matrix, self.data.cells)

    def real(self, rng: np.random.Generator) -> Modality:
        """Return an RNA cell of its sample for each cell, in turn in a random order."""
        obs = self.data.sequenced.obs
        theirs = obs[SAMPLE].to_numpy(dtype=str)
        ours = self.data.images.obs[SAMPLE].to_numpy(dtype=str)[self.data.cells]
        wanted = np.flatnonzero(np.isin(theirs, np.unique(ours)))
        matrix = self.data.sequenced.matrix(f"obsm/{self.data.embedding}")
        values = self._copied("real", matrix, wanted)
        rows = np.empty(len(ours), dtype=np.int64)
        for name in np.unique(ours):
            cells, rna = np.flatnonzero(ours == name), np.flatnonzero(theirs[wanted] == name)
            rows[cells] = np.resize(rng.permutation(rna), len(cells))
        return Modality(values, rows)

    def context(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mean image features of each bag that is used."""
        rows = np.full(len(self.data.images), -1)
        rows[self.data.cells] = np.arange(len(images))
        means, members = Modality(images, np.arange(len(images))), rows[self.bags.rows[self.used]]

        def make() -> NDArray[np.float32]:
            return torch.cat([means.take(some) for some in means.parts(members)]).numpy()

        return self.file("context", make)

    def synthetic(self) -> NDArray[np.float32]:
        """Return a draw of the model for each cell, from the bag that it is one of."""
        table = self.work / "synthetic.zarr"
        n, size = len(self.data.cells), self.model.config.bag_size

        def make() -> NDArray[np.float32]:
            how: dict[str, Any] = {"n_samples": size, "seed": self.seed, "device": str(self.device)}
            if isinstance(self.model, PublishedPhenoSeq):
                job = bag_job(self.model, self.data.images, SAMPLE, **how)
            else:
                job = sample_job(self.model, self.data.images, SAMPLE, **how)
            if not table.exists():
                with bar("drawing synthetic RNA") as progress:
                    predict_file(job, table, progress)
            drawn = zarr.open_group(table, mode="r")
            order = pd.Index(ad.io.read_elem(drawn["obs"]).index)
            row = order.get_indexer(np.array(self.bags.names)[self.used])[self.bag_of_cell]
            values = np.empty((n, len(job.var)), dtype=np.float32)
            for k in range(size):
                here = self._place == k
                values[here] = np.asarray(drawn[f"layers/draw_{k}"][:])[row[here]]  # type: ignore[index]
            return values

        return self.file("synthetic", make)

    def file(self, name: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return an array that is in a file, or is made and written."""
        path = self.work / f"{name}.npy"
        if not path.exists():
            made = make()
            partial = path.with_name(f"{name}.partial.npy")
            with room_for(path, "what was made before is kept"):
                np.save(partial, made)
            os.replace(partial, path)
        return _mapped(path)

    def _copied(self, name: str, matrix: Matrix, rows: Rows) -> NDArray[np.float32]:
        """Copy rows of a matrix in blocks, forwards, to a file that can be read at random."""
        path = self.work / f"{name}.npy"
        if path.exists():
            return _mapped(path)
        partial = path.with_name(f"{name}.partial.npy")
        shape = len(rows), matrix.shape[1]
        with room_for(path, "nothing was lost"), bar(f"reading {name}") as progress:
            copy = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            done = 0
            for some in blocks(rows, 4 * shape[1]):
                block = dense(matrix.take(some))
                broken = int((~np.isfinite(block).all(axis=1)).sum())
                if broken:
                    raise DataError(
                        f"{self.data.folder}: {broken} cells whose {name} values are not finite "
                        "numbers; remove them from the files"
                    )
                copy[done : done + len(some)] = block
                done += len(some)
                progress(done, len(rows))
            copy.flush()
            del copy
        os.replace(partial, path)
        return _mapped(path)


def _mapped(path: Path) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return found
