"""Tokenize and pack while training, without a store, for corpora larger than memory or disk."""
