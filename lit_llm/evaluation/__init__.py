"""Measure models on text: perplexity with intervals, paired comparisons, word-level perplexity."""
