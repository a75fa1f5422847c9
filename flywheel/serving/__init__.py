"""Answering new questions with what a run has learned: its models after a round, and the plan made for them."""
