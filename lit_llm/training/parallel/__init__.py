"""Strategies for several processes, and access to sharded weights."""
