"""Operations written by hand for speed, each tested against its plain definition."""
