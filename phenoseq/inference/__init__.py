"""Prediction: many cells, many draws, one AnnData."""
