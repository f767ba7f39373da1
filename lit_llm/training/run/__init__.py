"""The files of a run: checkpoints, metrics, and stopping and resuming."""
