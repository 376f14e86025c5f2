"""Encoder, denoiser, diffusion and expression space. No Lightning, no data, no hub."""
