"""Strategies of several processes, and the shards of weights that they keep."""
