"""Networks and mathematics: encoder, denoiser, diffusion, expression space. No Lightning, no data."""
