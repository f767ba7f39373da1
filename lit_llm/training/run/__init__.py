"""A run on disk: checkpoints, metrics, stops and resumption."""
