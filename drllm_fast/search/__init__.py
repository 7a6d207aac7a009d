"""Finding good layer paths: evaluator, search, tasks, store.

tasks, prompts, arithmetic   prompts to search paths for (`Item`)
evaluator                    what paths make of a prompt, many at once
searcher, mcts, beam, ...    which paths to try
rewards, grading             what a path is worth
worker                       searches prompts side by side
store, executors             keep results; spread the work over processes and machines
report                       what a search found, and how much of it is luck
"""

from drllm_fast.search.base import Outcome
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.report import SearchReport
from drllm_fast.search.searcher import Searcher, make_searcher
from drllm_fast.search.store import open_store, read_store
from drllm_fast.search.tasks import load_task
from drllm_fast.search.unit import Item, SearchConfig, UnitResult
from drllm_fast.search.worker import SearchWorker

__all__ = [
    "Item",
    "Outcome",
    "PathEvaluator",
    "SearchConfig",
    "SearchReport",
    "SearchWorker",
    "Searcher",
    "UnitResult",
    "load_task",
    "make_searcher",
    "open_store",
    "read_store",
]
