"""Evaluating routed models: accuracy against layers run, beside the dense model and static masks of the same size.

contenders   what is compared: the dense model, routers at their budgets, static and random masks
outcomes     what a path makes of an item, and the file that keeps it
run          scores every contender on every item, in shared forwards: `evaluate`
intervals    bootstrap intervals and paired tests
figures      from outcomes to figures
report       tables, plot and page
lm           the model class for lm-eval

`evaluate` is what `drllm-fast eval` runs:

    from drllm_fast.evaluation import evaluate
    from drllm_fast.search import load_task

    items = load_task("arc_easy.validation.jsonl.gz")
    report = evaluate(model, tokenizer, items, routers="checkpoint", static=["block-influence"], output="evaluated")
    print(report.text())
"""

from drllm_fast.evaluation.contenders import BUDGETS, Contender
from drllm_fast.evaluation.report import EvaluationReport
from drllm_fast.evaluation.run import evaluate

__all__ = ["BUDGETS", "Contender", "EvaluationReport", "evaluate"]
