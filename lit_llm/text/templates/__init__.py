"""Chat templates: analysis, and rendering within limits on time and memory."""
