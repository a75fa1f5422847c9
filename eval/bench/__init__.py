"""How fast: the engine's scheduler, the search, the grader."""
