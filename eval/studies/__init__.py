"""One file per study: its docstring is the question, `add_arguments` its options, `measure` its answer as JSON."""
