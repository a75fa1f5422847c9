"""Difficulty bins, bootstrap intervals, and signs of a broken adapter."""
