"""The data of a run: records, tokens, packed sequences and streams."""
