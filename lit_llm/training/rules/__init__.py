"""Compatibility rules of a run's settings: one table, also printed as a support matrix."""
