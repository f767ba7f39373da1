"""The command line: verbs, config keys, error messages and the summary of a run."""
