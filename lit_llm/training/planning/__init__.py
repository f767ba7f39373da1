"""Plan the memory, time and devices of a run before it starts."""
