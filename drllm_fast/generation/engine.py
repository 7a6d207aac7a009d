"""Answering many prompts with one model: what reads prompts, what decodes, and who comes next.

waiting --read in packed forwards, paths decided--> ready --joins the batch that its path suits--> running --> done
   a row that has ended leaves at once and gives its span of the pool back
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from drllm_fast.decoder import end_tokens, routable_decoder, row_positions, unwrap
from drllm_fast.enable import disable_dynamic_routing, enable_dynamic_routing
from drllm_fast.generation.calibration import packing_pays, step_cost
from drllm_fast.generation.decode_batch import DecodeBatch, place_prompts
from drllm_fast.generation.graphs import GraphedBatch, GraphedSteps, wanted
from drllm_fast.generation.kv_pool import KVPool, kv_bytes_per_token
from drllm_fast.generation.memory import free_bytes
from drllm_fast.generation.packed_weights import packable, packed
from drllm_fast.generation.prompt_forward import EngineCache, PromptForward, read_prompts
from drllm_fast.generation.requests import Delta, Request, encode
from drllm_fast.generation.sampling import Sampling, choose_tokens
from drllm_fast.generation.schedule import Schedule, joint_policy
from drllm_fast.generation.text_stream import TextStream
from drllm_fast.influence import evaluating
from drllm_fast.planner import order_rows
from drllm_fast.policies import GivenPlan
from drllm_fast.routing import set_budget
from drllm_fast.settings import current

# Budgets for which a copy of the policy is kept; prompts of one budget share forwards as long as theirs is.
MAX_POLICIES = 64


@dataclass
class EngineStats:
    """Counted since the engine was made.

    prompts, prompt_tokens   read
    tokens                   made, end-of-sequence tokens included
    prompt_forwards, steps   forwards that read prompts, and decode steps
    visits                   blocks run for a row of a decode step
    block_runs               blocks run in decode steps, whoever ran them: what is common to a batch is paid for each
    peak_rows                rows in the pool at once, at most
    peak_kv_bytes            keys and values held for tokens at once, at most
    """

    prompts: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    prompt_forwards: int = 0
    steps: int = 0
    visits: int = 0
    block_runs: int = 0
    peak_rows: int = 0
    peak_kv_bytes: int = 0


class Engine:
    """Answers prompts of a causal language model from transformers, routed or not (then every block runs once).

    model, tokenizer   as for `enable_dynamic_routing`; its own
    max_batch          rows that decode together; None: as many as `StepCost.batch_size` says, measured once on this
                       machine and kept
    lookahead          rows whose prompts are read before there is room in the batch, so that paths that suit each other
                       can be put together; None: as many as max_batch
    max_prompt_tokens  of a forward that reads prompts; a longer prompt has one of its own
    kv_tokens          tokens of one visit for whose keys and values there is room, all of it reserved at the start;
                       None: for max_batch + lookahead rows of `row_tokens` tokens that run every block, but at most
                       half of the memory that is free
    pack_weights       on the CPU: multiply by packed copies of the weights (`packed_weights`), which take as much
                       memory again; None: where measuring says that it pays, and half of the free memory suffices
    graphs             replay decode steps from CUDA graphs (`GraphedSteps`); None: on CUDA devices, where that is
                       measured to be faster
    order              "paths": rows that are ready join the batch that runs what they run; "arrival": as they came

    Used inside `with engine:`, where the model is routed and in evaluation mode; it is left as it was. One thread
    alone calls its methods, and those of other engines on this model. Raises what `enable_dynamic_routing` raises,
    TypeError or ValueError.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_batch: int | None = None,
        lookahead: int | None = None,
        max_prompt_tokens: int = 4096,
        kv_tokens: int | None = None,
        row_tokens: int = 1024,
        pack_weights: bool | None = None,
        order: str = "paths",
        graphs: bool | None = None,
    ):
        if order not in ("paths", "arrival"):
            raise ValueError(f"order must be 'paths' or 'arrival', got {order!r:.80}")
        for name, value, low in (
            ("max_batch", max_batch, 1),
            ("lookahead", lookahead, 0),
            ("max_prompt_tokens", max_prompt_tokens, 1),
            ("kv_tokens", kv_tokens, 1),
            ("row_tokens", row_tokens, 1),
        ):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r:.80}")
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.top, self.tokenizer = unwrap(model), tokenizer
        self.decoder = routable_decoder(self.top)
        self.num_layers = len(self.decoder.layers)
        self.schedule = Schedule(max_batch or 0, lookahead or 0, max_prompt_tokens, order)
        self._open = max_batch is None, lookahead is None  # sizes to be settled
        self.kv_tokens, self.row_tokens = kv_tokens, row_tokens
        self.pool: KVPool | None = None
        self.packs = self._packs(pack_weights)
        self.positions = row_positions(self.decoder.config)
        self.vocabulary = self.top.config.get_text_config(decoder=True).vocab_size
        self.ends = end_tokens(self.top, tokenizer)
        self.stats = EngineStats()
        self._numbers = itertools.count()
        self._policies: dict[tuple, tuple[Any, Any]] = {}  # the policy, and its copy of that budget
        self._dense = GivenPlan([1] * self.num_layers)
        self._graphs, self._graphs_required = wanted(graphs, self.device), bool(graphs)
        self._steps: GraphedSteps | None = None
        self._newest: torch.Tensor | None = None  # their newest tokens, on the device
        self._batch: DecodeBatch | GraphedBatch | None = None  # of `running`, as long as its rows stay
        self._around: ExitStack | None = None

    def _packs(self, wanted: bool | None) -> bool:
        layers = packable(self.top)
        if wanted and not layers:
            raise ValueError(
                "pack_weights=True, but nothing can be packed: it takes the compiled extension (drllm-fast info) and "
                "plain linear layers of float32 or bfloat16 on the CPU"
            )
        if wanted is None and layers:
            size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
            return size < free_bytes(self.device) // 2 and packing_pays(layers)
        return bool(wanted)

    # -- around all of it
    def __enter__(self) -> Engine:
        if self._around is not None:
            raise RuntimeError("this engine is running already")
        with ExitStack() as around:
            around.enter_context(in_use(self.top, self.decoder))
            self._owner = self.decoder._drllm_routing
            self._cache = EngineCache(self.decoder.config)
            self._packed = False
            self._around = around
            try:
                if self.pool is None:
                    self._settle()
            except BaseException:
                self._around = None
                raise
            if self._graphs:
                parts = self._owner, self.pool, self.top, self._cache, self.device
                self._steps = GraphedSteps(*parts, required=self._graphs_required)
            self._around = around.pop_all()
        return self

    def pack(self) -> None:
        """Pack the weights, where that is wanted, until the engine is left. The first step does."""
        if self.packs and not self._packed:
            self._around.enter_context(packed(packable(self.top)))
        self._packed = True

    def _settle(self) -> None:
        """The sizes that were left open."""
        if self._open[0]:
            self.schedule.max_batch = step_cost(self).batch_size()
        if self._open[1]:
            self.schedule.lookahead = self.schedule.max_batch
        tokens = self.kv_tokens
        if tokens is None:
            most = free_bytes(self.device) // 2 // kv_bytes_per_token(self.decoder.config, self.decoder.dtype)
            # At least two: the path of one row may have twice the visits.
            rows = max(self.schedule.max_batch + self.schedule.lookahead, 2)
            tokens = min(rows * self.num_layers * self.row_tokens, most)
        self.pool = KVPool(max(tokens, 1))

    def __exit__(self, *exception: object) -> None:
        around, self._around = self._around, None
        for request in [*self.schedule.waiting, *self.schedule.ready, *self.schedule.running]:
            self.cancel(request)
        self._policies.clear()
        self._steps = self._batch = None
        self.pool.keys = self.pool.values = None  # the model may have another dtype or device next time
        around.close()

    def _check_entered(self) -> None:
        if self._around is None:
            raise RuntimeError("use the engine inside `with engine:`")
        if getattr(self.decoder, "_drllm_routing", None) is not self._owner:
            raise RuntimeError(
                "dynamic routing of this model was switched while prompts are answered; end the engine, or the "
                "iterator that generate returned, before that"
            )

    @property
    def device(self) -> torch.device:
        return self.decoder.get_input_embeddings().weight.device

    @property
    def busy(self) -> bool:
        return bool(len(self.schedule))

    # -- prompts in and out
    def submit(
        self,
        prompt: str | Sequence[int] | Sequence[dict],
        sampling: Sampling | None = None,
        *,
        budget: float | None = None,
        path: Sequence[int] | None = None,
    ) -> Request:
        """Queue a prompt: a text, token ids or the messages of a chat.

        budget  in place of the policy's own, for a policy that keeps one
        path    how often each block runs, in place of what the policy says

        Raises TypeError or ValueError for what cannot be answered; nothing is queued then.
        """
        request = self._request(prompt, Sampling() if sampling is None else sampling, budget, path)
        request.index = next(self._numbers)
        self.schedule.waiting.append(request)
        return request

    def encoded(
        self, prompt: Any, sampling: Sampling, *, budget: float | None, path: Sequence[int] | None
    ) -> list[int]:
        """The tokens of a prompt that `submit` would take. Raises what it would raise."""
        return self._request(prompt, sampling, budget, path).prompt

    def _request(self, prompt: Any, sampling: Sampling, budget: float | None, path: Sequence[int] | None) -> Request:
        self._check_entered()
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {type(sampling).__name__}")
        ids = encode(self.tokenizer, prompt)
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ValueError(f"token ids must be from 0 to {self.vocabulary - 1}, got {min(ids)} to {max(ids)}")
        policy, bound = self._policy(budget, path)
        new = sampling.max_new_tokens
        if self.positions is not None:
            if len(ids) >= self.positions:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens leaves no room for an answer in the model's {self.positions} "
                    "positions; shorten it"
                )
            new = min(new, self.positions - len(ids))
        capacity = len(ids) + new - 1  # the last token is never read
        if bound * capacity > self.pool.size:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and up to {new} new ones may need {bound * capacity} places for keys "
                f"and values, the pool has {self.pool.size}; raise kv_tokens, or shorten the prompt or its answer"
            )
        return Request(-1, ids, sampling, policy, bound, capacity, TextStream(self.tokenizer, sampling.stop))

    def cancel(self, request: Request) -> None:
        """Drop a prompt wherever it is; one that has ended stays as it is."""
        if request.finish_reason is None:
            self._drop(request, "cancelled")

    def _policy(self, budget: float | None, path: Sequence[int] | None) -> tuple[Any, int]:
        """What chooses the path, and how many visits it has at most."""
        if path is not None:
            if budget is not None:
                raise ValueError("give a budget or a path, not both")
            given = GivenPlan(path)
            given.bind(self.top)
            if given.plan.ndim != 1:
                raise ValueError(f"the path of one prompt is {self.num_layers} integers, got {list(given.plan.shape)}")
            return given, max(1, int(given.plan.sum()))
        settings = current(self._owner)
        if settings.disabled:
            return self._dense, self.num_layers
        policy, bound = settings.plan or self._owner.policy, 2 * self.num_layers
        if isinstance(policy, GivenPlan):
            if policy.plan.ndim != 1 and len(policy.plan) != 1:
                raise ValueError(
                    "a plan of several paths does not say which prompt takes which; give each prompt its path"
                )
            bound = max(1, int(policy.plan.sum(-1).max()))
        if budget is None:
            return policy, bound
        key = (id(policy), type(budget), budget)
        if key not in self._policies:
            own = copy(policy)
            set_budget(own, budget)
            if len(self._policies) >= MAX_POLICIES:
                del self._policies[next(iter(self._policies))]
            self._policies[key] = policy, own
        return self._policies[key][1], bound

    # -- a step
    def step(self) -> list[Delta]:
        """Do the next piece of work: read prompts if there is room for their rows, else decode one token of each row of
        the batch. What is new of each answer. Nothing is left to do once `busy` is False.

        What the model or a policy raises ends the rows of that forward (finish_reason "error") and is raised.
        """
        self._check_entered()
        self.pack()
        with torch.inference_mode():
            group = self.schedule.prompts(self.pool.largest)
            if not group and self.schedule.refill():
                self._batch = None
            rows = group or list(self.schedule.running)
            try:
                return self._read(group) if group else self._decode()
            except BaseException:
                for request in rows:
                    self._drop(request, "error")
                raise

    def _read(self, group: list[Request]) -> list[Delta]:
        began = time.monotonic()
        run, logits = read_prompts(
            self.top, self._cache, self._owner, [r.prompt for r in group], self.num_layers, joint_policy(group),
            self.device,
        )  # fmt: skip
        tokens = choose_tokens(logits, [r.sampling for r in group], [0] * len(group)).tolist()
        visits = run.plan.sum(1).tolist()
        starts = self._place(run, visits, [r.capacity for r in group])
        # All have their spans before the first token is looked at, so that what fails there gives all of them back.
        now = time.monotonic()
        for request, path, count, place in zip(group, run.plan.tolist(), visits, starts, strict=True):
            request.read_at, request.first_at = began, now
            request.path, request.visits, request.start = tuple(path), count, place
            request.held = len(request.prompt)
        self.schedule.read(group)
        self.stats.prompts += len(group)
        self.stats.prompt_tokens += run.packed.tokens
        self.stats.prompt_forwards += 1
        self._note_peaks()
        return [self._take(request, token) for request, token in zip(group, tokens, strict=True)]

    def _place(self, run: PromptForward, visits: list[int], capacity: list[int]) -> list[int]:
        """Where the spans of rows that were read begin; their keys and values are there.

        There is room: the schedule saw a free span that takes them one after another with the most visits they may
        have. Each takes the first place that holds it, so that no more of the pool is touched than rows need.
        """
        spans = [count * tokens for count, tokens in zip(visits, capacity, strict=True)]
        starts: list[int] = []
        try:
            for span in spans:
                starts.append(self.pool.allocate(span) if span else 0)
            place_prompts(run, self.pool, starts, capacity)
        except BaseException:
            for start, span in zip(starts, spans, strict=False):
                if span:
                    self.pool.release(start, span)
            raise
        return starts

    def _decode(self) -> list[Delta]:
        rows = self.schedule.running
        if not rows:
            return []
        if self._batch is None:
            if len({r.path for r in rows}) > 1:
                order = order_rows([r.path for r in rows])
                rows = self.schedule.running = [rows[i] for i in order]
            plan = np.array([r.path for r in rows], dtype=np.int8)
            layout = [r.start for r in rows], [r.capacity for r in rows], [r.held for r in rows]
            if self._steps is not None:
                self._batch = self._steps.batch(plan, *layout)
            else:
                self._batch = DecodeBatch(self._owner, self.pool, plan, *layout, self.device)
            newest = torch.tensor([r.tokens[-1] for r in rows], device="cpu")
            self._newest = newest.to(self.device, non_blocking=True)
        logits = self._batch.step(self.top, self._cache, self._newest)
        self._newest = choose_tokens(logits, [r.sampling for r in rows], [len(r.tokens) for r in rows])
        tokens = self._newest.tolist()  # all that a step waits for
        self.stats.steps += 1
        self.stats.visits += sum(r.visits for r in rows)
        self.stats.block_runs += self._batch.visits
        for request in rows:
            request.held += 1
        self._note_peaks()
        return [self._take(request, token) for request, token in zip(list(rows), tokens, strict=True)]

    def _take(self, request: Request, token: int) -> Delta:
        """A row's next token, and its end if it is that."""
        self.stats.tokens += 1
        if token in self.ends and not request.sampling.ignore_eos:
            request.finish_reason = "stop"
            new, text = [], ""
        else:
            request.tokens.append(token)
            new, text = [token], request.text.push(token)
            if request.text.stopped:
                request.finish_reason = "stop"
            elif len(request.prompt) + len(request.tokens) > request.capacity:
                request.finish_reason = "length"
        if request.finish_reason is None:
            return Delta(request.index, text, new)
        text += request.text.finish()
        self._drop(request, "stop" if request.text.stopped else request.finish_reason)
        return Delta(request.index, text, new, request.result(self.pool.bytes_per_token()))

    def _drop(self, request: Request, reason: str) -> None:
        """A row ends and leaves."""
        request.finish_reason = reason
        place = self.schedule.remove(request)
        if place == "running":
            self._batch = None
        if place is not None and request.span:
            self.pool.release(request.start, request.span)

    def _note_peaks(self) -> None:
        rows = [*self.schedule.ready, *self.schedule.running]
        held = sum(r.visits * r.held for r in rows) * self.pool.bytes_per_token()
        self.stats.peak_rows = max(self.stats.peak_rows, len(rows))
        self.stats.peak_kv_bytes = max(self.stats.peak_kv_bytes, held)


@contextmanager
def in_use(top: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """A model that is routed and in evaluation mode, for all engines that run on it at a time: the last one leaves it
    as the first found it."""
    if not hasattr(decoder, "_drllm_engines"):
        engines = decoder._drllm_engines = [0, ExitStack()]  # how many, and what the last one undoes
        engines[1].enter_context(evaluating(top))
    engines = decoder._drllm_engines
    engines[0] += 1
    try:
        if not hasattr(decoder, "_drllm_routing"):
            enable_dynamic_routing(top, [1] * len(decoder.layers))
            engines[1].callback(_unrouted, top, decoder, decoder._drllm_routing)
        yield
    finally:
        engines[0] -= 1
        if not engines[0]:
            del decoder._drllm_engines
            engines[1].close()


def _unrouted(top: nn.Module, decoder: nn.Module, routing: object) -> None:
    if getattr(decoder, "_drllm_routing", None) is routing:  # else somebody has switched it off since
        disable_dynamic_routing(top)
