"""Load, build, inspect and quantize causal language models."""
