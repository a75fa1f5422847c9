"""Questions and their answers: reading problem sets, making splits, grading."""
