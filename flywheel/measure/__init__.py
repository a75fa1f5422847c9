"""Bins, intervals, and what a broken adapter looks like."""
