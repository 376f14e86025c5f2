"""From what a lab has on disk to batches: readers, store, splits, streaming, simulation."""
