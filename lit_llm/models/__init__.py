"""A causal language model: loaded or built, taken apart, quantized."""
