"""What the data hold, for a terminal and for a page."""
