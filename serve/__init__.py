"""The HTTP server: `python -m serve --model DIR`. Outside the package, so that training needs no web dependencies."""
