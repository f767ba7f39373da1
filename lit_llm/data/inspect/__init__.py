"""Show the data of a run in the terminal or as an HTML page."""
