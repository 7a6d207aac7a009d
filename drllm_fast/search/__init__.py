"""Finding good layer paths: evaluator, search, tasks, store."""

from drllm_fast.search.evaluator import PathEvaluator

__all__ = ["PathEvaluator"]
