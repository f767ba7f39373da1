"""Checks before and during a run: incompatible options, divergence, and verification of results."""
