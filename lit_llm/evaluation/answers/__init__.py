"""The `generate` verb: answers of models to prompts in a file, with scores where there are references."""
