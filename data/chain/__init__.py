"""The laboratory: chain arithmetic with misconceptions, and a seed model trained on it from nothing."""
