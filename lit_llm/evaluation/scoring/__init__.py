"""What scores windows of tokens: a model on this machine, or one of a server."""
