"""The same without a store, for corpora larger than memory or disk."""
