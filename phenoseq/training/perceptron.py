"""Perceptrons on what is known of cells, one at a time or in bags: they tell labels, or predict."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from phenoseq.errors import ModelError

Rows = NDArray[np.int64]
Progress = Callable[[int, int], None]
#: What a network reads, one tensor a modality, and what it should say.
Batch: TypeAlias = tuple[list[Tensor], Tensor]
#: Bytes of values that are read at a time at most.
_READ = 128 << 20


@dataclass(frozen=True)
class PerceptronConfig:
    """A perceptron and its training; by default those of scGeneScope's benchmark.

    Attributes
    ----------
    width, layers
        Of its hidden layers, and how many linear layers there are.
    lr, weight_decay, batch_size, clip
        Of Adam, and the largest norm of a gradient.
    cut_after, patience
        Epochs without gain in validation after which the learning rate is cut by 10, and after
        which training ends.
    epochs
        At most.
    bag_batch, bags_per_epoch
        Bags a step, and a multiple of it in an epoch, where examples are bags.
    """

    width: int = 512
    layers: int = 5
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 4096
    clip: float = 0.5
    cut_after: int = 5
    patience: int = 12
    epochs: int = 100
    bag_batch: int = 256
    bags_per_epoch: int = 8192


@dataclass(frozen=True)
class Modality:
    """One thing that is known of each of n cells.

    Attributes
    ----------
    values
        Float32 ``(m, width)``, in memory or memory-mapped.
    rows
        Which of them each cell has, int64 ``(n,)``.
    """

    values: NDArray[np.float32]
    rows: Rows

    @property
    def width(self) -> int:
        """Numbers a cell."""
        return int(self.values.shape[1])

    def take(self, cells: Rows) -> Tensor:
        """Return the values of cells ``(n,)``, or their means over bags of cells ``(n, size)``."""
        found = self.values[self.rows[cells]]
        return torch.from_numpy(found if cells.ndim == 1 else found.mean(axis=1))

    def parts(self, cells: Rows) -> list[Rows]:
        """Divide cells or bags into runs of bounded memory."""
        size = max(_READ // (4 * self.width * (cells.size // max(len(cells), 1))), 1)
        return [cells[start : start + size] for start in range(0, len(cells), size)]

    def scale(self, cells: Rows) -> tuple[Tensor, Tensor]:
        """Return mean and deviation over cells, float32 ``(width,)``; that of a constant is 1."""
        first = self.take(cells[:1]).double()
        total, squares = torch.zeros_like(first[0]), torch.zeros_like(first[0])
        for some in self.parts(cells):
            away = self.take(some).double() - first
            total += away.sum(dim=0)
            squares += away.square().sum(dim=0)
        mean = total / len(cells)
        std = (squares / len(cells) - mean.square()).clamp(min=0).sqrt()
        std[std < 1e-6] = 1.0
        return (mean + first[0]).float(), std.float()


class Perceptron(nn.Module):
    """Linear layers with LayerNorm (no affine) and ReLU between; several inputs are fused.

    With several modalities each has a perceptron of its own, whose output is normalised; they are
    concatenated and read by another of two layers.

    Parameters
    ----------
    config
        Its sizes.
    scales
        Mean and deviation of each modality, by which it is standardised.
    n_out
        Numbers that come out.
    seed
        Of the first weights.
    """

    def __init__(
        self,
        config: PerceptronConfig,
        scales: Sequence[tuple[Tensor, Tensor]],
        n_out: int,
        seed: int,
    ) -> None:
        super().__init__()
        for i, (mean, std) in enumerate(scales):
            self.register_buffer(f"mean_{i}", mean)
            self.register_buffer(f"std_{i}", std)
        hidden = [config.width] * (config.layers - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if len(scales) == 1:
                self.branches = nn.ModuleList([_layers([len(scales[0][0]), *hidden, n_out])])
                self.head: nn.Module = nn.Identity()
                return
            self.branches = nn.ModuleList(
                nn.Sequential(
                    _layers([len(mean), *hidden, config.width]),
                    nn.LayerNorm(config.width, elementwise_affine=False),
                )
                for mean, _ in scales
            )
            self.head = _layers([len(scales) * config.width, config.width, n_out])

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Read one tensor ``(B, width)`` a modality, in its own scale; return ``(B, n_out)``."""
        device = self.get_buffer("mean_0").device
        read = [
            branch((part.to(device) - self.get_buffer(f"mean_{i}")) / self.get_buffer(f"std_{i}"))
            for i, (branch, part) in enumerate(zip(self.branches, parts, strict=True))
        ]
        out: Tensor = self.head(torch.cat(read, dim=1))
        return out


def _layers(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        norm = nn.LayerNorm(n_out, elementwise_affine=False)
        layers += [nn.Linear(n_in, n_out), norm, nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def fit(
    network: Perceptron,
    epoch: Callable[[np.random.Generator], Iterable[Batch]],
    score: Callable[[], float],
    config: PerceptronConfig,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[float, int]:
    """Train a perceptron, and leave it as it was where validation was best.

    Parameters
    ----------
    network
        Trained in place, where it is.
    epoch
        Gives the batches of an epoch. Targets are classes (integers, cross-entropy) or numbers
        (squared error).
    score
        Tells how good the network is on the validation part; more is better.
    config
        How.
    seed
        Of the batches.
    progress
        Called with (epochs done, epochs at most).

    Returns
    -------
    The best score, and its epoch.

    Raises
    ------
    ModelError
        Where no score is a number.
    """
    adam = torch.optim.Adam(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    device = network.get_buffer("mean_0").device
    best, chosen, kept = -np.inf, 0, copy.deepcopy(network.state_dict())
    for number in range(1, config.epochs + 1):
        for parts, target in epoch(np.random.default_rng([seed, number])):
            out, wanted = network(parts), target.to(device)
            if wanted.is_floating_point():
                loss = nn.functional.mse_loss(out, wanted)
            else:
                loss = nn.functional.cross_entropy(out, wanted)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            adam.step()
        found = score()
        if found > best:
            best, chosen, kept = found, number, copy.deepcopy(network.state_dict())
        if progress is not None:
            progress(number, config.epochs)
        stale = number - chosen
        if stale >= config.patience:
            break
        if stale and stale % config.cut_after == 0:
            for group in adam.param_groups:
                group["lr"] /= 10
    if not chosen:
        raise ModelError("a perceptron learned nothing: its validation scores are no numbers")
    network.load_state_dict(kept)
    return float(best), chosen


@torch.inference_mode()
def outputs(network: Perceptron, modalities: Sequence[Modality], cells: Rows) -> Iterator[Tensor]:
    """Yield what a network says of cells ``(n,)``, or of bags ``(n, size)``, some at a time."""
    widest = max(modalities, key=lambda modality: modality.width)
    for some in widest.parts(cells):
        yield network([modality.take(some) for modality in modalities])


def regress(
    inputs: Modality,
    targets: Modality,
    train: Rows,
    val: Rows,
    config: PerceptronConfig,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Predict one modality from another by a perceptron with squared error.

    Parameters
    ----------
    inputs, targets
        Of the same cells; the target may be of other cells of the same sample, whose mean is then
        what is learned.
    train, val
        Cells that it is fitted to, and by which it is selected.
    config, seed, device, progress
        See :func:`fit`.

    Returns
    -------
    The prediction for each of ``inputs.values``, float32 ``(m, targets.width)``, in the scale of
    the targets.
    """
    mean, std = targets.scale(train)
    network = Perceptron(config, [inputs.scale(train)], targets.width, seed).to(device)

    def epoch(rng: np.random.Generator) -> Iterator[Batch]:
        order = rng.permutation(train)
        for start in range(0, len(order), config.batch_size):
            some = order[start : start + config.batch_size]
            yield [inputs.take(some)], (targets.take(some) - mean) / std

    def score() -> float:
        total = 0.0
        wanted = ((targets.take(some) - mean) / std for some in inputs.parts(val))
        for out, want in zip(outputs(network, [inputs], val), wanted, strict=True):
            total += float((out.cpu() - want).square().mean(dim=1).sum())
        return -total / len(val)

    fit(network, epoch, score, config, seed=seed, progress=progress)
    whole = Modality(inputs.values, np.arange(len(inputs.values)))
    made = [out.cpu() * std + mean for out in outputs(network, [whole], whole.rows)]
    return torch.cat(made).numpy()
