"""The HTTP server: `python -m serve --model DIR`. Outside the package, so that training machines need no web stack."""
