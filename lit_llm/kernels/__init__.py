"""Hand-written operations for speed, each tested against a plain definition."""
