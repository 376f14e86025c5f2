"""Published benchmarks, complete: from files to scores."""
