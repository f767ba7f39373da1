"""Files of records to batches of packed rows: records, tokens, rows, stream."""
