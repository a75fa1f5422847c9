"""What a person sees of a run: tables, pictures, W&B."""
