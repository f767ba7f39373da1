"""What a run proves or refuses before and while it trains."""
