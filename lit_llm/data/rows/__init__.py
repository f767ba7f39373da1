"""Token sequences to packed rows and batches."""
