"""Memory, time and devices of a run before it begins."""
