"""Speed benchmarks: the engine's scheduler, the search, the server, trainings, the grader, and growing data."""
