"""Questions and their answers: reading problem sets, drawing splits, grading."""
