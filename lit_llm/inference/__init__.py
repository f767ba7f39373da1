"""Generate text from trained models: engine, chat and export."""
