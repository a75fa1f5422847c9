"""Speed benchmarks: the engine's scheduler, the search, the server, trainings, the grader; memory and time as the data grows."""
