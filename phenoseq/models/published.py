"""The published PhenoSeq network: a bag of cells' image features -> RNA embeddings of the sample.

"Cell Painting Generates Single-Cell Transcriptomics via Conditional Diffusion" (ICML 2026
workshop). Cells of a bag are encoded to context tokens; the noisy embedding is one token, which
reads them block by block and comes out as the predicted noise. Modules are named as in that
project's checkpoints, so that their tensors go by the same names here; the network is written
anew.

Draws of one bag share its context. What depends on the bag alone (context, keys, values) is
computed once a bag, and what depends on the time alone (scales and shifts) once a time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from phenoseq.errors import ModelError
from phenoseq.models.diffusion import Sampler, sample, sampler_times
from phenoseq.models.files import check_weights, load_weights, read_config, save_folder
from phenoseq.models.published_config import PublishedConfig
from phenoseq.models.published_network import FOLD_DRAWS, Memory, PublishedNetwork, Schedule


class PublishedPhenoSeq(nn.Module):
    """Generates RNA embeddings of a sample from the image features of a bag of its cells.

    Parameters
    ----------
    config
        Everything besides the weights.

    Attributes
    ----------
    rna_mean, rna_std
        Mean and deviation of the training embeddings, ``(D,)``: the network works on standardised
        ones.
    features_mean, features_std
        The same of the image features, ``(F,)``.
    """

    rna_mean: Tensor
    rna_std: Tensor
    features_mean: Tensor
    features_std: Tensor

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        config.check("the configuration")
        self.config = config
        with torch.device("cpu"):
            self.path = config.noise.path()
        self.denoiser = PublishedNetwork(config.sizes)
        for name, size in (("rna", config.sizes.embedding), ("features", config.sizes.features)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def encode(self, features: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode bags of cells to context tokens.

        Parameters
        ----------
        features
            Image features in their own scale, float ``(B, N, F)``: N cells of each of B bags.
        keep
            Which cells count, bool ``(B, N)``, at least one a bag; all by default.

        Returns
        -------
        Tokens ``(B, N, dim)``, and ``keep``.
        """
        if keep is None:
            keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        scaled = (features.float() - self.features_mean) / self.features_std
        hidden = None if bool(keep.all()) else ~keep
        tokens: Tensor = self.denoiser.img_encoder(scaled, hidden)
        return tokens, keep

    def remember(self, context: tuple[Tensor, Tensor], *, draws: int = 1) -> Memory:
        """Compute every block's keys and values, once a bag.

        Parameters
        ----------
        context
            From :meth:`encode`.
        draws
            Embeddings of each bag that are going to be denoised at once; where they are many, and
            the cells few, the maps of query and output are folded into keys and values.
        """
        tokens, keep = context
        mask = None
        if not bool(keep.all()):
            mask = torch.zeros(keep.shape, dtype=tokens.dtype, device=tokens.device)
            mask = mask.masked_fill(~keep, -math.inf)[:, None, None]
        sizes = self.config.sizes
        fold = draws >= FOLD_DRAWS and sizes.heads * tokens.shape[1] <= sizes.dim
        keys, values, offsets = [], [], []
        for block in self.denoiser.layers:
            k, v = block.cross_attn.keys_values(block.norm_ctx(tokens))  # type: ignore[union-attr,operator]
            if fold:
                k, v, offset = block.cross_attn.fold(k, v)  # type: ignore[union-attr,operator]
                offsets.append(offset)
            keys.append(k)
            values.append(v)
        return Memory(keys, values, offsets, mask)

    def schedule(self, t: Tensor) -> Schedule:
        """Compute what depends on the time alone.

        Parameters
        ----------
        t
            Times in (0, 1], of any shape; that of the published timestep k - 1 is k / T.
        """
        timestep = (t * self.config.noise.timesteps - 1).float()
        time = self.denoiser.time_embed(timestep.to(self.rna_mean.device))
        return Schedule([block.modulate(time) for block in self.denoiser.layers])  # type: ignore[operator]

    def denoise(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Predict the noise in noisy standardised embeddings.

        Parameters
        ----------
        x
            ``(B, K, D)``: K draws, or K noise levels, of each bag.
        t
            Times in (0, 1], ``()`` for one time for all, or ``(B, K)``.
        memory
            From :meth:`remember`.

        Returns
        -------
        The noise, ``(B, K, D)``.
        """
        out: Tensor = self.denoiser(x, self.schedule(t), memory)
        return out

    def generate(
        self,
        context: tuple[Tensor, Tensor],
        noise: Tensor,
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        published_steps: bool = False,
    ) -> Tensor:
        """Turn noise into embeddings of the samples that these bags are of.

        Parameters
        ----------
        context
            From :meth:`encode`, of B bags.
        noise
            Standard normal, ``(B, K, D)``: K draws a bag.
        steps, sampler
            Evaluations of the network, and the sampler; by default the model's own.
        published_steps
            Sample as the published project does: DDIM from pure noise at the times of
            :func:`published_times`, which for 50 ``steps`` (its default, and here) start at 0.98
            of the schedule. It is there to reproduce that project's numbers: its mean and spread
            are further off.

        Returns
        -------
        Embeddings in their own scale, ``(B, K, D)``.

        Raises
        ------
        ModelError
            Where ``steps`` is impossible, or a sampler is given with ``published_steps``.
        """
        how = self.config.noise
        if published_steps and sampler not in (None, "ddim"):
            raise ModelError(f"published_steps is a way of DDIM, not of {sampler!r}: give one only")
        if published_steps:
            times = published_times(how.timesteps, 50 if steps is None else steps)
            steps, sampler = len(times) - 1, "ddim"
        else:
            steps, sampler = how.steps if steps is None else steps, sampler or how.sampler
            times = sampler_times(self.path, "eps", sampler, steps)
        memory = self.remember(context, draws=noise.shape[1])
        table = {float(t): s for t, s in zip(times[:-1], self._schedules(times[:-1]), strict=True)}

        def denoise(x: Tensor, t: float) -> Tensor:
            eps: Tensor = self.denoiser(x, table[t], memory)
            if not published_steps:
                return eps
            alpha, sigma = self.path.scales(torch.tensor(t, dtype=torch.float64))
            return (x - sigma * eps) / alpha  # x0, and nothing held where alpha is next to 0

        standard = sample(
            denoise,
            noise,
            path=self.path,
            output="x0" if published_steps else "eps",
            sampler=sampler,
            steps=steps,
            times=times,
        )
        return standard * self.rna_std + self.rna_mean

    def _schedules(self, times: Tensor) -> list[Schedule]:
        """Compute the schedules of several times in one pass over the weights."""
        many = self.schedule(times)
        return [
            Schedule([tuple(part[i] for part in parts) for parts in many.parts])
            for i in range(len(times))
        ]

    def denoising_loss(
        self, context: tuple[Tensor, Tensor], embeddings: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Return the squared error of the predicted noise, the published training loss.

        One encoded bag serves K embeddings of cells of its sample, at K noise levels.

        Parameters
        ----------
        context
            From :meth:`encode`, of B bags.
        embeddings
            In their own scale, ``(B, K, D)``.
        t
            Times k / T for k from 1 to T, ``(B, K)``.
        noise
            Standard normal, ``(B, K, D)``.

        Returns
        -------
        Float ``(B, K)``.
        """
        clean = (embeddings - self.rna_mean) / self.rna_std
        made = self.denoise(self.path.mix(clean, noise, t), t, self.remember(context))
        return (made.float() - noise).square().mean(dim=-1)

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all."""
        return save_folder(folder, self.config.to_json(), self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Rebuild a model from its folder, in evaluation mode, on the CPU.

        Raises
        ------
        ModelError
            Where a file is missing, broken, or holds other tensors than the configuration asks for.
        """
        config = PublishedConfig.from_json(*read_config(folder))
        with torch.inference_mode(False):  # in which changes of weights would not be counted
            with torch.device("meta"):  # whose weights take neither memory nor time
                model = cls(config)
            check_weights(model, folder)
            load_weights(model, folder, adopt=True)
        return model.eval()


def published_times(timesteps: int, steps: int) -> Tensor:
    """Return the times of the published DDIM, and 0: ``range(0, T, T // steps)`` reversed.

    They may be more than ``steps``: 31 for 30 and 1,000 for 600 where T is 1,000.

    Returns
    -------
    Tensor
        One more than the evaluations, falling, float64 on the CPU.

    Raises
    ------
    ModelError
        If ``steps`` is not from 1 to T.
    """
    if not 1 <= steps <= timesteps:
        raise ModelError(f"steps = {steps}: choose a number from 1 to {timesteps}")
    places = [k + 1 for k in range(0, timesteps, timesteps // steps)][::-1]
    return torch.tensor([*places, 0], dtype=torch.float64) / timesteps
