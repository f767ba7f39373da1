"""One optimizer step: the division of its loss by supervised tokens, and checks of the metrics that are monitored."""
