"""Routed models in the evaluation harness lm-eval, whose results then compare with its own of the dense model.

lm-eval's class for transformers puts context and answer into one input, so that a router would read the answer, and
pads it on the right without a mask, so that it would read padding. Here the path is chosen by the context alone, every
answer is scored along it, and what answers share is run once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.paths import route_paths, token_groups
from drllm_fast.policies import GivenPlan, as_policy
from drllm_fast.routing import set_budget
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.tokens import encode_pair, encode_prompt, prefix_token

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError("drllm_fast.evaluation.lm needs lm-eval: pip install 'drllm-fast[eval]'") from error

Tokens = Sequence[int]
GREEDY = {"do_sample", "temperature", "top_p", "top_k", "min_p"}  # what may be asked for and changes no greedy answer


def run_lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    policy: object = None,
    budget: float | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    include_defaults: bool = True,
    apply_chat_template: bool | str = False,
    system_instruction: str | None = None,
    max_tokens: int = 8192,
    use_cache: str | os.PathLike[str] | None = None,
    bootstrap_iters: int = 100_000,
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` of a model under a policy: its dict of results, samples included.

    model, tokenizer, policy, max_tokens   as for `RoutedLM`
    budget        of the policy, or of the model's own, while the tasks run
    tasks         lm-eval's names; also tasks, groups and tags of YAML files in `include_path`, which need no network if
                  their `dataset_path` is json and `dataset_kwargs` names `data_files`
    include_defaults   False leaves lm-eval's own tasks out, whose thousands of files take seconds to list
    limit         documents of a task, or a share of them if below 1
    use_cache     a file in which answers are kept, so that a run that was stopped goes on. lm-eval's key is the request
                  alone: give each model, policy and budget a file of its own

    The others are those of simple_evaluate. Raises ValueError for a task there is not, and what `RoutedLM` raises.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a list of one or more names, got {tasks!r:.80}")
    lm = RoutedLM(model, tokenizer, policy=policy, max_tokens=max_tokens)
    paths = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
    for path in paths:
        if not os.path.isdir(path):
            raise OSError(f"include_path {os.fspath(path)} is no folder; give the one that holds the tasks' YAML files")
    manager = TaskManager(include_path=[os.fspath(p) for p in paths] or None, include_defaults=include_defaults)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-eval has no tasks {unknown}; `lm-eval ls tasks` lists them, and include_path adds YAML files"
        )
    if budget is not None and lm.policy is None:
        raise ValueError("a budget needs a policy that keeps it, and the model is dense; give policy=")
    before = getattr(lm.policy, "budget", None)
    if budget is not None:
        set_budget(lm.policy, budget)
    try:
        return lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            use_cache=None if use_cache is None else os.fspath(use_cache),
            bootstrap_iters=bootstrap_iters,
        )
    finally:
        if budget is not None:
            lm.policy.budget = before


class RoutedLM(TemplateLM):
    """A causal language model from transformers for lm-eval, routed by a policy or dense.

    policy              what `enable_dynamic_routing` takes, one path for all prompts at most; None: the model's own if
                        it is routed, else the dense model
    max_tokens          of a forward at its widest, in place of a batch size. Paths do not depend on it, nor on the
                        requests' order or on which answers come along; scores do within rounding
    chat_template_args  of the tokenizer's apply_chat_template, such as {"enable_thinking": False}

    A context that is longer than the model's positions loses tokens on its left, as with lm-eval's own class: its path
    is chosen by as many as the model can read, whatever the answer's length, and an answer is scored after as many as
    fit before it. Raises ValueError for a plan of several paths, since lm-eval forms the batches, and what
    `PathEvaluator` and `enable_dynamic_routing` raise.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        policy: object = None,
        max_tokens: int = 8192,
        chat_template_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        routing = getattr(decoder_of(unwrap(model)), "_drllm_routing", None)
        if policy is not None:
            policy = as_policy(policy)
        elif routing is not None:
            policy = routing.policy
        if isinstance(policy, GivenPlan) and policy.plan.ndim == 2 and len(policy.plan) > 1:
            raise ValueError(
                f"a plan of {len(policy.plan)} paths says nothing about lm-eval's prompts; give one path, or a policy"
            )
        if hasattr(policy, "bind"):
            policy.bind(unwrap(model))
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self.max_tokens = max_tokens
        self.chat_template_args = chat_template_args or {}
        # Of a prompt that is asked once, no states are worth keeping.
        self.evaluator = PathEvaluator(model, tokenizer, store_bytes=0, max_tokens=max_tokens)

    # -- what lm-eval asks for
    @property
    def max_length(self) -> int:
        """Tokens of an input: the model's positions, else the tokenizer's limit, else 2048."""
        return self.evaluator.positions or resolve_max_length(unwrap(self.model).config, self.tokenizer, default=2048)

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task does not say."""
        return 256

    @property
    def device(self) -> torch.device:
        return self.evaluator.device

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            return encode_prompt(self.tokenizer, string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request (context, continuation) the continuation's log-likelihood in nats, and whether greedy
        decoding would write it. ValueError for a continuation that has no tokens of its own."""
        asked = [(request.args, *encode_pair(self.tokenizer, *request.args)) for request in requests]
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each request (text,) its log-likelihood in nats, in lm-eval's windows.

        A window's context, which chooses its path, is the prefix token in the first, the one token before it in further
        full ones, and what fills the window up in the last. A router trained on prompts sees next to nothing there, so
        that of a routed model this measures mostly the path that it gives a text of one token.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text) if text else [],
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *utils.make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each request (context, arguments) the text that greedy decoding writes, up to the first of the texts
        `until` or the end token, of `max_gen_toks` tokens at most.

        A context is cut on the left where it leaves less than that room. ValueError where it would leave nothing;
        NotImplementedError for sampling, beams and whatever else is not plain greedy decoding.
        """
        prompts, kinds = [], []
        for request in requests:
            context, arguments = request.args
            until, room = self._ends(arguments)
            prompts.append(encode_prompt(self.tokenizer, context)[-(self.max_length - room) :])
            kinds.append((tuple(until), room))
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for kind in dict.fromkeys(kinds):
                until, room = kind
                own = [number for number, other in enumerate(kinds) if other == kind]
                for group in token_groups([len(prompts[number]) + room for number in own], self.max_tokens):
                    numbers = [own[place] for place in group]
                    paths = self._paths([prompts[number] for number in numbers])
                    asked = [(prompts[number], path) for number, path in zip(numbers, paths, strict=True)]
                    written = self.evaluator.greedy_tokens(asked, room, stop=until)
                    for number, (tokens,) in zip(numbers, written, strict=True):
                        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                        answers[number] = postprocess_generated_text(text, list(until), None)
                        self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
                    bar.update(len(group))
        return answers

    # -- inside
    def _ends(self, arguments: dict[str, Any]) -> tuple[list[str], int]:
        """Texts that end an answer, and how many tokens it may have."""
        kwargs = normalize_gen_kwargs(arguments, self.max_gen_toks)
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        until = [text for text in handle_stop_sequences(kwargs.pop("until"), eos) if text]
        room = kwargs.pop("max_gen_toks")
        if kwargs.pop("num_beams", 1) != 1 or kwargs["do_sample"] or kwargs.keys() - GREEDY:
            raise NotImplementedError(
                f"generation arguments {arguments}: only greedy decoding is supported; leave out sampling, beams and "
                "penalties (do_sample: false, temperature: 0.0)"
            )
        if not 1 <= room < self.max_length:
            raise ValueError(
                f"max_gen_toks is {room}, and must be at least 1 and less than the {self.max_length} tokens that the "
                "model can read"
            )
        return until, room

    def _paths(self, contexts: Sequence[Tokens]) -> list[list[int]]:
        """The path of each context."""
        if self.policy is None:
            return [[1] * self.evaluator.num_layers] * len(contexts)
        return route_paths(self.model, contexts, self.policy, max_tokens=self.max_tokens).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for _, context, answer in requests:
            if not context or not answer:
                raise ValueError(f"every context and continuation needs a token, got {context!r:.40}, {answer!r:.40}")
            if len(answer) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(answer)} tokens; the model reads {self.max_length}, so that it cannot be "
                    "scored after a context"
                )
        contexts = [tuple(context[-self.max_length :]) for _, context, _ in requests]
        units = self._units(contexts, [answer for _, _, answer in requests])
        paths: dict[Tokens, list[int]] = {}
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        lengths = [len(context) + sum(len(requests[number][2]) for number in numbers) for context, numbers in units]
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for group in token_groups(lengths, self.max_tokens):
                asked = [units[place] for place in group]
                new = [context for context in dict.fromkeys(context for context, _ in asked) if context not in paths]
                paths.update(zip(new, self._paths(new), strict=True) if new else ())
                scored = self.evaluator.score_tokens(
                    [([self._fitted(*requests[n][1:]) for n in numbers], paths[context]) for context, numbers in asked]
                )
                for (_, numbers), (scores, greedy) in zip(asked, scored, strict=True):
                    for number, score, sure in zip(numbers, scores[0].tolist(), greedy[0].tolist(), strict=True):
                        results[number] = (score, sure)
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
                    bar.update(len(numbers))
        return results

    def _units(self, contexts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[tuple[Tokens, list[int]]]:
        """Contexts, each once with the numbers of its requests; more than once where its answers fill a forward."""
        numbers: dict[Tokens, list[int]] = {}
        for number, context in enumerate(contexts):
            numbers.setdefault(context, []).append(number)
        units = []
        for context, own in numbers.items():
            room = 0
            for number in own:
                room -= len(answers[number])
                if room < 0:
                    units.append((context, []))
                    room = self.max_tokens - len(context) - len(answers[number])
                units[-1][1].append(number)
        return units

    def _fitted(self, context: Tokens, answer: Tokens) -> tuple[Tokens, Tokens]:
        """The context without the tokens on its left for which there is no room; the answer's last token needs none."""
        return context[-(self.max_length + 1 - len(answer)) :], answer
