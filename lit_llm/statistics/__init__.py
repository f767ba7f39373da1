"""Sums of each evaluated document, and confidence intervals of figures that are ratios of such sums."""
