"""Weights to words."""
