"""The machine and its files: locks, hashes, threads, secrets, what a config may name."""
