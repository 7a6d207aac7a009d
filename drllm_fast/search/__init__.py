"""Finding good layer paths: evaluator, search, tasks, store."""
