"""Questions with their answers: readers, near duplicates, grading."""
