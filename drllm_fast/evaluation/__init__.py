"""Evaluating routed models: accuracy against layers run, beside the dense model and static masks of the same size.

contenders   what is compared: the dense model, routers at their budgets, static and random masks
run          scores every contender on every item, in shared forwards
intervals    bootstrap intervals and paired tests
report       tables, plot and page
lm           the model class for lm-eval
"""
