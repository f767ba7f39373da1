"""Pack token sequences into rows of a fixed length, mix sources, and collate batches."""
