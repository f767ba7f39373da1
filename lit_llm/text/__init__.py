"""Convert conversations and documents to token ids, and token ids back to text."""
