"""Packaged samples: small documents, conversations, a tokenizer and a base model, named `sample:NAME`."""
