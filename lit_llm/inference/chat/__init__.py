"""The `chat` command: a conversation in the terminal with a model of this machine or of a server."""
