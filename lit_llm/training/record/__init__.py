"""What a run records about itself for its report."""
