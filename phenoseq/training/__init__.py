"""Training: the LightningModule, its callbacks, and the baselines that every table shows."""
