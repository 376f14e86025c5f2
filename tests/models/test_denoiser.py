"""The denoiser computes each draw of each cell by itself, from that cell's context alone."""

from __future__ import annotations

import pytest
import torch

B, K, N, D, DIM = 4, 3, 5, 7, 32


@pytest.fixture
def inputs(rng):
    """Noisy latents, times, context, and which of its tokens count."""
    return (
        torch.randn(B, K, D, generator=rng),
        torch.rand(B, K, generator=rng),
        torch.randn(B, N, DIM, generator=rng),
        torch.ones(B, N, dtype=torch.bool),
    )


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


def test_shape_and_that_every_input_matters(denoiser, inputs):
    x, t, context, keep = inputs
    out = denoiser(x, t, denoiser.remember(context, keep))
    assert out.shape == (B, K, D)
    for changed in (
        denoiser(x + 0.1, t, denoiser.remember(context, keep)),
        denoiser(x, t * 0.5, denoiser.remember(context, keep)),
        denoiser(x, t, denoiser.remember(context * 1.5, keep)),
    ):
        assert (changed - out).abs().amax(dim=-1).min() > 1e-4


def test_an_untrained_denoiser_predicts_zeros(inputs):
    from phenoseq.models.denoiser import Denoiser, DenoiserConfig

    x, t, context, keep = inputs
    fresh = Denoiser(DenoiserConfig(dim=DIM, depth=1, heads=2), latent_dim=D)
    assert not fresh(x, t, fresh.remember(context, keep)).any()


def test_draws_of_a_cell_do_not_see_each_other(denoiser, inputs):
    x, t, context, keep = inputs
    memory = denoiser.remember(context, keep)
    whole = denoiser(x, t, memory)
    for k in range(K):
        close(denoiser(x[:, [k]], t[:, [k]], memory)[:, 0], whole[:, k])
    other = x.clone()
    other[:, 1:] = 100.0
    close(denoiser(other, t, memory)[:, 0], whole[:, 0])


def test_cells_do_not_see_each_other(denoiser, inputs):
    x, t, context, keep = inputs
    whole = denoiser(x, t, denoiser.remember(context, keep))
    for b in range(B):
        some = slice(b, b + 1)
        alone = denoiser(x[some], t[some], denoiser.remember(context[some], keep[some]))
        close(alone[0], whole[b])


def test_a_cell_reads_its_own_context(denoiser, inputs):
    x, t, context, keep = inputs
    x, t = x[:1].expand(B, K, D), t[:1].expand(B, K)
    out = denoiser(x, t, denoiser.remember(context, keep))
    order = torch.tensor([2, 0, 3, 1])
    close(denoiser(x, t, denoiser.remember(context[order], keep)), out[order])
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_what_is_remembered_serves_every_call(denoiser, inputs):
    x, t, context, keep = inputs
    memory = denoiser.remember(context, keep)
    first = denoiser(x, t, memory)
    denoiser(x * 2, t * 0.1, memory)
    assert torch.equal(denoiser(x, t, memory), first)
    assert torch.equal(denoiser(x, t, denoiser.remember(context, keep)), first)


def test_one_time_for_all_is_that_time_for_each(denoiser, inputs):
    x, _, context, keep = inputs
    memory = denoiser.remember(context, keep)
    for time in (0.0, 0.37, 1.0):
        each = denoiser(x, torch.full((B, K), time), memory)
        close(denoiser(x, torch.tensor(time), memory), each)
        close(denoiser(x, torch.tensor(time, dtype=torch.float64), memory), each, 2e-5)


def test_each_draw_goes_by_its_own_time(denoiser, inputs):
    x, t, context, keep = inputs
    memory = denoiser.remember(context, keep)
    out = denoiser(x, t, memory)
    for b in range(B):
        for k in range(K):
            close(denoiser(x, t[b, k], memory)[b, k], out[b, k])


def test_masked_tokens_do_not_matter(denoiser, inputs):
    x, t, context, keep = inputs
    keep = keep.clone()
    keep[0, 3:] = keep[2, :2] = False
    out = denoiser(x, t, denoiser.remember(context, keep))
    other = torch.where(keep[..., None], context, 50.0)
    close(denoiser(x, t, denoiser.remember(other, keep)), out)
    short = denoiser(x[:1], t[:1], denoiser.remember(context[:1, :3], keep[:1, :3]))
    close(short[0], out[0])
    every = denoiser(x, t, denoiser.remember(context, torch.ones_like(keep)))
    assert (every - out)[0].abs().max() > 1e-4
    close(every[1], out[1])


def test_order_of_the_context_tokens_is_no_information(denoiser, inputs):
    """Position and stain are written into the tokens by the encoder."""
    x, t, context, keep = inputs
    order = torch.tensor([4, 2, 0, 1, 3])
    out = denoiser(x, t, denoiser.remember(context, keep))
    close(denoiser(x, t, denoiser.remember(context[:, order], keep)), out)


def test_dropped_context_is_the_null_token_whatever_the_image(denoiser, inputs):
    x, t, context, keep = inputs
    drop = torch.tensor([True, False, True, False])
    out = denoiser(x, t, denoiser.remember(context, keep, drop))
    with_context = denoiser(x, t, denoiser.remember(context, keep))
    null = denoiser.null.expand(B, 1, DIM)
    without = denoiser(x, t, denoiser.remember(null, torch.ones(B, 1, dtype=torch.bool)))
    close(out[drop], without[drop])
    close(out[~drop], with_context[~drop])
    assert (with_context - without).abs().max() > 1e-4
    keep = keep.clone()
    keep[0] = False  # a dropped cell counts as dropped even where it has nothing to read
    close(denoiser(x, t, denoiser.remember(context, keep, drop))[0], without[0])


def test_gradients_reach_every_weight(denoiser, inputs):
    x, t, context, keep = inputs
    drop = torch.tensor([True, False, False, False])
    context.requires_grad_(True)
    denoiser(x, t, denoiser.remember(context, keep, drop)).square().sum().backward()
    still = [n for n, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert not context.grad[0].any()
    assert context.grad[1:].abs().amax(dim=(1, 2)).min() > 0


def test_times_that_differ_little_are_told_apart_without_aliasing(denoiser, inputs):
    x, _, context, keep = inputs
    memory = denoiser.remember(context, keep)
    times = torch.linspace(0, 1, 201)
    out = torch.stack([denoiser(x[:1, :1], t, memory_of(memory))[0, 0] for t in times])
    distance = torch.cdist(out, out) + torch.eye(len(times))
    assert distance.min() > 1e-5


def memory_of(memory):
    """The memory of the first cell."""
    from phenoseq.models.denoiser import Memory

    return Memory([(k[:1], v[:1]) for k, v in memory.keys_values], None)
