"""Figures of sampled validation cells, for whatever logger takes figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.models.embedding import EmbeddingSpace
from phenoseq.models.load import Model
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.training.base import Drawn, TrainingModule
from phenoseq.training.logs import CsvLogger

#: Genes shown, at these quantiles of their correlation; genes of the heat maps; cells drawn.
_QUANTILES, _MAP_GENES, _DOTS = (1.0, 0.95, 0.75, 0.5), 40, 2000


class SampleFigures(L.Callback):
    """Logs a figure whenever a validation has sampled: see :func:`draw_samples`.

    It shows the cells of the first rank.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and log."""
        assert isinstance(pl_module, TrainingModule)
        if pl_module.drawn is None or not trainer.is_global_zero:
            return
        scored = pl_module.scored.cpu().numpy()
        names = [name for name, one in zip(names_of(pl_module.model), scored, strict=True) if one]
        figure = draw_samples(pl_module.drawn, names, scored)
        for logger in trainer.loggers:
            log_figure(logger, "val_samples", figure, trainer.global_step)


def names_of(model: Model) -> list[str]:
    """Return the names of what a model predicts: symbols of genes, or numbers of dimensions."""
    if isinstance(model, PublishedPhenoSeq):
        return [f"{model.config.embedding} {i}" for i in range(model.config.sizes.embedding)]
    if isinstance(model.expression, EmbeddingSpace):
        config = model.expression.config
        return [f"{config.name} {i}" for i in range(config.width)]
    return list(model.expression.config.symbols)


def draw_samples(drawn: Drawn, names: list[str], scored: NDArray[np.bool_]) -> Figure:
    """Draw predicted against true values of some genes, and co-expression of truth and one draw.

    Parameters
    ----------
    drawn
        Cells that were sampled.
    names
        Of the scored genes.
    scored
        Which genes those are, bool ``(g,)``.

    Returns
    -------
    Above: genes at the 100th, 95th, 75th and 50th percentile of their correlation. Below: Pearson
    correlation between the genes that vary most, of the truth and of one draw.
    """
    truth, mean, draw = (x[:, scored] for x in map(_numpy, (drawn.truth, drawn.mean, drawn.draw)))
    correlation = pcc_gene(truth, mean)
    ranked = np.argsort(correlation)
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 12, height_ratios=(1, 1.7))
    for k, quantile in enumerate(_QUANTILES):
        gene = ranked[int(quantile * (len(ranked) - 1))]
        axes = figure.add_subplot(grid[0, 3 * k : 3 * k + 3])
        axes.scatter(truth[:_DOTS, gene], mean[:_DOTS, gene], s=4, alpha=0.5, lw=0)
        axes.set_title(f"{names[gene]}: r = {correlation[gene]:.2f}", fontsize=9)
        axes.set_xlabel("true")
    figure.axes[0].set_ylabel("mean of draws")
    most = np.sort(np.argsort(truth.var(axis=0))[::-1][:_MAP_GENES])
    for k, (values, title) in enumerate(((truth, "true"), (draw, "one draw"))):
        axes = figure.add_subplot(grid[1, 6 * k : 6 * k + 6])
        with np.errstate(invalid="ignore", divide="ignore"):
            together = np.nan_to_num(np.atleast_2d(np.corrcoef(values[:, most].T)))
        image = axes.imshow(together, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(f"correlation between genes, {title}", fontsize=9)
    figure.colorbar(image, ax=figure.axes[-2:], shrink=0.7)
    return figure


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Give a figure to a logger, as TensorBoard, W&B and MLflow take it; of CSV beside its file."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, global_step=step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(key=name, images=[_pixels(figure)])
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}/step_{step:08d}.png")
    elif isinstance(logger, CsvLogger):
        folder = Path(logger.save_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"step_{step:08d}.png", dpi=80)


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
