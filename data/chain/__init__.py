"""The synthetic problem set: chain arithmetic with misconceptions, and a seed model trained on it from scratch."""
