"""Records to token sequences, kept in a store on disk."""
