"""One optimizer step: how the loss of its micro-batches is divided."""
