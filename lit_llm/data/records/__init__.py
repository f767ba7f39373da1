"""Read files and hub datasets as records, and convert records to conversations and documents."""
