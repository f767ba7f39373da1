"""Curves and tables of the report, as SVG, PNG and HTML."""
