"""Studies over finished runs."""
