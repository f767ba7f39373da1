"""The command line: verbs, keys of a config, and what a user sees when a command ends."""
