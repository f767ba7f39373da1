"""What of a run goes with what: one table of rules, and its print as a support matrix."""
