"""Tasks of lm-evaluation-harness, computed by this project's models and renderer: `evaluate --tasks`."""
