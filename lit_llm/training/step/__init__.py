"""One optimizer step: how the loss of its micro-batches is divided, and which logged figures callbacks monitor."""
