"""Files to records: conversations and documents."""
