"""Create, save, load and merge PEFT adapters."""
