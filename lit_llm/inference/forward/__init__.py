"""Compute the logits after the tokens of several requests: all in one pass, or request by request."""
