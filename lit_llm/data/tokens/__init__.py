"""Encode records as token sequences, and store them on disk."""
