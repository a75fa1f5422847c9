"""Difficulty bins, bootstrap intervals, and checks for a broken adapter."""
