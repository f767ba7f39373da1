"""Pack token sequences, mix sources, and collate batches of packed sequences (rows)."""
