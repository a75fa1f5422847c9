"""Problem sets: builders and readers, and the small default set with its seed model."""
