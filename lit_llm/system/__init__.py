"""The machine and its files: locks, hashes, threads, secrets, and limits on configs."""
