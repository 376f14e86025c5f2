"""The model: encoder, denoiser, diffusion path and expression space, composed; saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from phenoseq.models.appearance import pixel_statistics
from phenoseq.models.config import ImageConfig, PhenoSeqConfig, SampleConfig
from phenoseq.models.denoiser import Denoiser
from phenoseq.models.diffusion import guided, make_path, sample, to_prediction
from phenoseq.models.embedding import EmbeddingSpace
from phenoseq.models.encoder import Encoder, EncoderConfig
from phenoseq.models.expression import ExpressionSpace
from phenoseq.models.files import read_config, rebuild, save_folder
from phenoseq.models.givenfeatures import FeatureEncoder
from phenoseq.models.record import TrainingRecord


class ContextDiffusion(nn.Module):
    """Generates latents of expression by diffusion, given the context tokens of images.

    What models of cells and of samples have in common. Where the diffusion is centred, a regression
    of the pooled context gives the latent's mean, and the denoiser sees and predicts what is left
    of it: ``x_t - alpha(t) mean``, and its prediction less the mean's part. (Residual diffusion, as
    in Mardani et al., "Residual corrective diffusion modeling", 2025; here both are trained at
    once.)

    Attributes
    ----------
    context_mean, context_whiten
        ``(dim,)`` and ``(dim, dim)``: mean of the training cells' pooled contexts, and the map that
        gives them unit covariance; one half of the out-of-distribution score is the distance there.
    """

    config: PhenoSeqConfig | SampleConfig
    encoder: Encoder | FeatureEncoder
    expression: ExpressionSpace | EmbeddingSpace
    image_mean: Tensor
    image_std: Tensor
    context_mean: Tensor
    context_whiten: Tensor

    def _compose(self, expression: ExpressionSpace | EmbeddingSpace) -> None:
        """Build all parts but the encoder."""
        config = self.config
        dim = config.denoiser.dim
        self.path = make_path(config.diffusion.path)
        latent = config.expression.latent_dim
        self.denoiser = Denoiser(config.denoiser, latent)
        if config.diffusion.centred:
            self.mean_head = nn.Sequential(
                nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, latent)
            )
        self.expression = expression
        self.register_buffer("context_mean", torch.zeros(dim))
        self.register_buffer("context_whiten", torch.eye(dim))

    def _read_crops(self, config: EncoderConfig, image: ImageConfig) -> None:
        """Build the encoder of crops."""
        n, dim = len(image.channels), self.config.denoiser.dim
        self.encoder = Encoder(config, n, image.crop_px, dim)
        mean, std = torch.tensor(image.mean), torch.tensor(image.std)
        self.register_buffer("image_mean", mean[:, None, None], persistent=False)
        self.register_buffer("image_std", std[:, None, None], persistent=False)

    def _encode_crops(self, images: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        scaled = (images.float() - self.image_mean) / self.image_std
        if present is None:
            present = torch.ones(scaled.shape[:2], dtype=torch.bool, device=scaled.device)
        tokens, keep = self.encoder(scaled, present)
        return tokens, keep

    def generate(
        self,
        context: tuple[Tensor, Tensor],
        noise: Tensor,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Turn noise into latents of the cells with this context.

        Parameters
        ----------
        context
            From ``encode``, of B cells or bags.
        noise
            Standard normal, ``(B, K, D)``: K draws of each.
        steps
            Evaluations of the denoiser; the model's own number by default.
        guidance
            Classifier-free weight; other than 1 it changes the spread of the draws.

        Returns
        -------
        Latents ``(B, K, D)``.
        """
        how = self.config.diffusion
        conditional = unconditional = self._denoise(context)
        if guidance != 1:
            drop = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
            unconditional = self._denoise(context, drop)
        return sample(
            guided(conditional, unconditional, guidance),
            noise,
            path=self.path,
            output=how.output,
            sampler=how.sampler,
            steps=how.steps if steps is None else steps,
        )

    def denoising_loss(
        self,
        context: tuple[Tensor, Tensor],
        target: Tensor,
        t: Tensor,
        noise: Tensor,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Return the squared error of the denoised latents, weighted to that of the velocity.

        Parameters
        ----------
        context
            From ``encode``, of B cells or bags.
        target
            What is predicted, raw counts or embeddings, float: of each cell ``(B, g)``, or of T
            RNA cells of each bag ``(B, T, g)``.
        t
            Noise levels, ``(B, K)``: K of the cell, or K / T of each of its RNA cells, in turn.
        noise
            Standard normal, ``(B, K, D)``.
        drop
            Cells or bags whose context is withheld, bool ``(B,)``.

        Returns
        -------
        Float ``(B, K)``.
        """
        output = self.config.diffusion.output
        clean = self._latents(target)
        clean = clean.repeat_interleave(noise.shape[1] // clean.shape[1], dim=1)
        made = self._denoise(context, drop)(self.path.mix(clean, noise, t), t).float()
        error = (made - to_prediction(self.path, output, clean, noise, t)) ** 2
        if output == "x0":
            error = error * self.path.v_weight(t)[..., None]
        loss: Tensor = (error * self.expression.weight).mean(dim=-1)
        return loss

    def mean_loss(self, context: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Return the squared error of the regression, of a model that is centred.

        Parameters
        ----------
        context, target
            As of :meth:`denoising_loss`.

        Returns
        -------
        Float ``(B, T)``; T is 1 of cells.
        """
        error = (self._mean(context) - self._latents(target)) ** 2
        loss: Tensor = (error * self.expression.weight).mean(dim=-1)
        return loss

    def expected(self, context: tuple[Tensor, Tensor], latent: Tensor) -> Tensor:
        """Return the mean latent of cells, ``(B, D)``.

        That of the regression, where the model is centred, else the mean of the draws.

        Parameters
        ----------
        context
            From ``encode``.
        latent
            Draws, ``(B, K, D)``, from :meth:`generate`.
        """
        if self.config.diffusion.centred:
            return self._mean(context)[:, 0]
        return latent.mean(dim=1)

    def _latents(self, target: Tensor) -> Tensor:
        """Return the clean latents of a target, ``(B, T, D)``."""
        return self.expression.encode(target if target.ndim == 3 else target[:, None])

    def _mean(self, context: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean of the latent, ``(B, 1, D)``."""
        mean: Tensor = self.mean_head(pool(*context))
        return mean.float()[:, None]

    def _denoise(
        self, context: tuple[Tensor, Tensor], drop: Tensor | None = None
    ) -> Callable[[Tensor, Tensor | float], Tensor]:
        """Return the prediction, given x_t ``(B, K, D)`` and t, one number or ``(B, K)``.

        The mean learns from its own loss alone.
        """
        memory = self.denoiser.remember(*context, drop)
        centred, output = self.config.diffusion.centred, self.config.diffusion.output
        mean = self._mean(context).detach() if centred else None
        if mean is not None and drop is not None:
            mean = mean * ~drop[:, None, None]

        def denoise(x: Tensor, t: Tensor | float) -> Tensor:
            t = torch.as_tensor(t, device=x.device)
            if mean is None:
                left: Tensor = self.denoiser(x, t, memory)
                return left
            at, nothing = mean.expand_as(x), torch.zeros_like(x)
            left = self.denoiser(x - self.path.mix(at, nothing, t), t, memory)
            return left + to_prediction(self.path, output, at, nothing, t)

        return denoise

    def strangeness(
        self, context: tuple[Tensor, Tensor], cells: Tensor, present: Tensor | None = None
    ) -> Tensor:
        """Return how far cells lie from training cells, ``(B,)``, about 1 inside.

        The Mahalanobis distance of the pooled context (Lee et al. 2018), over the square root of
        its width, and that of the pixel statistics of the crop
        (:class:`~phenoseq.models.appearance.Appearance`), as the root of their mean square; where
        features are read, the first alone. Of a bag the root of the mean square over its cells.

        Parameters
        ----------
        context
            From ``encode``.
        cells, present
            What was encoded.
        """
        pooled, own = self.pooled(context)
        away = (pooled.flatten(0, 1) - self.context_mean) @ self.context_whiten
        square = away.square().mean(dim=1).view(own.shape)
        image = self.image_config
        if image is not None and image.appearance is not None:
            if present is None:
                present = own.new_ones(len(own), len(image.channels))
            each = present.repeat_interleave(own.shape[1], dim=0)
            looks = image.appearance.distance(self.pixels(cells), each)
            square = (square + looks.square().view(own.shape)) / 2
        return ((square * own).sum(dim=1) / own.sum(dim=1).clamp(min=1)).sqrt()

    def disagreement(self, latent: Tensor) -> Tensor:
        """Return how far the draws ``(B, K, D)`` of each cell lie apart, ``(B,)``.

        The root mean square deviation from their mean, latents weighted as in the loss, in units of
        the spread of training cells: 1 where the image tells nothing, 0 where it tells all, or
        there is one draw.
        """
        variance = latent.var(dim=1, correction=0)
        return (variance * self.expression.weight).mean(dim=1).sqrt()

    @property
    def image_config(self) -> ImageConfig | None:
        """The crops that are read; None where features are."""
        image = self.config.image if isinstance(self.config, PhenoSeqConfig) else self.config.cells
        return image if isinstance(image, ImageConfig) else None

    def pixels(self, images: Tensor) -> Tensor:
        """Return the pixel statistics of crops, or of all cells of bags, ``(n, k)``."""
        return pixel_statistics(images.flatten(0, -4), self.image_std)

    def with_image(self, **changes: Any) -> Self:
        """Return this model of crops with other values in its :class:`ImageConfig`.

        Such as where the pixel statistics of its training crops lie (``appearance``), or how pixels
        are scaled (``mean``, ``std``).
        """
        old = self.image_config
        assert old is not None
        image, config = replace(old, **changes), self.config
        if isinstance(config, PhenoSeqConfig):
            self.config = replace(config, image=image)
        else:
            self.config = replace(config, cells=image)
        self.image_mean.copy_(torch.tensor(image.mean)[:, None, None])
        self.image_std.copy_(torch.tensor(image.std)[:, None, None])
        return self

    def pooled(self, context: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the pooled tokens of cells, ``(B, N, dim)``, and which cells count, ``(B, N)``.

        N is 1 where a context is of one cell.
        """
        cells = pool(*context)[:, None]
        return cells, torch.ones_like(cells[..., 0], dtype=torch.bool)

    def with_record(self, training: TrainingRecord) -> Self:
        """Return this model with another training record."""
        self.config = replace(self.config, training=training)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all."""
        return save_folder(folder, self.config.to_json(), self.state_dict())


class PhenoSeq(ContextDiffusion):
    """Predicts the expression of cells from their images.

    Parameters
    ----------
    config
        Everything besides the weights.
    expression
        A fitted expression space; by default an empty one, to load weights into.
    """

    config: PhenoSeqConfig
    encoder: Encoder
    expression: ExpressionSpace

    def __init__(self, config: PhenoSeqConfig, expression: ExpressionSpace | None = None) -> None:
        super().__init__()
        self.config = config
        self._read_crops(config.encoder, config.image)
        self._compose(expression or ExpressionSpace(config.expression))

    def encode(self, images: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode crops to context tokens.

        Parameters
        ----------
        images
            Raw pixels in the scale of the training images, ``(B, C, H, W)``, any dtype.
        present
            Which stains there are, bool ``(B, C)``; all by default.

        Returns
        -------
        Tokens ``(B, N, dim)``, and which of them to attend to, bool ``(B, N)``.
        """
        return self._encode_crops(images, present)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Rebuild a model from its folder, in evaluation mode, on the CPU.

        Raises
        ------
        ModelError
            Where a file is missing, broken, or holds other tensors than the configuration asks for.
        """
        config = PhenoSeqConfig.from_json(*read_config(folder))
        return rebuild(lambda: cls(config), folder)


def pool(tokens: Tensor, keep: Tensor) -> Tensor:
    """Average the tokens that count, ``(B, N, dim)`` and ``(B, N)`` -> ``(B, dim)``."""
    weight = keep[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
