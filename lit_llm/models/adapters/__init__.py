"""PEFT's adapters on a model: made, saved, loaded, merged."""
