"""Chat templates: their analysis, and their rendering within limits."""
