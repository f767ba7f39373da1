"""A conversation or a document to token ids, and back."""
