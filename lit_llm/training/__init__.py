"""Training: the module, the trainer, the loss, strategies, planning and checks."""
