"""Speed benchmarks: the engine's scheduler, the search, the grader."""
