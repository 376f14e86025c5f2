"""Scores of predictions against measured expression. Reads AnnData only, never a model."""
