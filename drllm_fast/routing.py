"""`model.routing`: what a routed model did, and the context managers that change what it does next."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from drllm_fast.active import ACTIVE
from drllm_fast.cache import RoutedCache, check_convertible
from drllm_fast.executor import RoutedForward
from drllm_fast.packed import PackedBatch
from drllm_fast.policies import GivenPlan, RoutingPolicy, check_length
from drllm_fast.stats import RoutingStats


@dataclass(frozen=True)
class Settings:
    """What the context managers of this thread ask for, for one model."""

    disabled: bool = False
    plan: GivenPlan | None = None
    context: tuple[int, ...] | None = None
    prompt_columns: int | None = None  # set by generate: later columns are draft or answer tokens
    count_positions: bool = False  # set by generate: its position_ids are its own, and go wrong after right padding


@dataclass
class Tally:
    """What the executor counted since a prompt batch was prefilled. It travels with the batch's cache, so that
    threads and interleaved batches do not mix."""

    plan: Tensor
    tokens: list[int]
    cached: list[int]
    layer_rows: list[int]
    layer_tokens: list[int]
    bytes_per_token: list[int]
    forwards: int

    @classmethod
    def add(cls, run: RoutedForward, cache: RoutedCache | None, *, continued: bool) -> Tally:
        """The tally with one more forward in it."""
        cached = [0] * run.packed.batch if cache is None else cache.lengths
        if continued:
            old = cache.tally
            same = len(old.tokens) == run.packed.batch
            tally = cls(
                run.plan,
                [a + b for a, b in zip(old.tokens, run.packed.lengths, strict=True)] if same else cached,
                cached,
                [a + b for a, b in zip(old.layer_rows, run.layer_rows, strict=True)],
                [a + b for a, b in zip(old.layer_tokens, run.layer_tokens, strict=True)],
                old.bytes_per_token,
                old.forwards + 1,
            )
        else:
            size = [0] * len(run.layer_rows) if cache is None else cache.bytes_per_token()
            tally = cls(run.plan, run.packed.lengths, cached, run.layer_rows, run.layer_tokens, size, 1)
        if cache is not None:
            cache.tally = tally
        return tally

    def stats(self, windows: list[int]) -> RoutingStats:
        numbers = (self.tokens, self.cached, self.layer_rows, self.layer_tokens, self.bytes_per_token, windows)
        tokens, cached, rows, visited, size, window = (torch.tensor(n, dtype=torch.int64) for n in numbers)
        return RoutingStats(
            plan=self.plan,
            tokens=tokens,
            cached=cached,
            layer_rows=rows,
            layer_tokens=visited,
            kv_bytes_per_token=size,
            kv_window=window,
            forwards=self.forwards,
        )


# Per thread and task, settings by the id of the Routing they are for. Replaced, never changed.
_SETTINGS: ContextVar[dict[int, Settings]] = ContextVar("drllm_fast_settings", default={})  # noqa: B039


class Routing:
    """The routing of one model: its policy, and what the last prompt batch ran.

    Made by `enable_dynamic_routing`; reach it as `model.routing`.
    """

    def __init__(self, policy: RoutingPolicy, num_layers: int, windows: list[int], attention: str):
        self.policy = policy
        self.num_layers = num_layers
        self._windows = windows  # sliding window of each layer, 0 for full attention
        self._attention = attention  # the name the config must carry while routing is on
        self._last: Tally | None = None

    def __repr__(self) -> str:
        budget = getattr(self.policy, "budget", None)
        return f"Routing({type(self.policy).__name__}, {self.num_layers} layers, budget={budget})"

    # -- what ran -----------------------------------------------------------------------------------------------
    @property
    def stats(self) -> RoutingStats:
        """Visits, tokens and KV bytes of the last prompt batch (of any thread), its decoding included.

        Raises RuntimeError before the first forward."""
        if self._last is None:
            raise RuntimeError("no prompt has been routed yet; call the model or model.generate first")
        return self._last.stats(self._windows)

    @property
    def plan(self) -> Tensor:
        """int8 [B, L], the paths of the last prompt batch."""
        return self.stats.plan

    @property
    def budget(self) -> float | None:
        """The policy's budget, the mean share of the dense visits; None for a policy without one."""
        return getattr(self.policy, "budget", None)

    @budget.setter
    def budget(self, budget: float) -> None:
        set_budget(self.policy, budget)

    def summary(self, **kwargs) -> str:
        """A table for people: per row its path, the layers it ran and the KV bytes it holds."""
        from drllm_fast.report import summary

        return summary(self.stats, **kwargs)

    def plot(self, path: str | None = None, **kwargs):
        """A heat map of the plan, examples by layers; saved to `path` if given. Returns the matplotlib Figure."""
        from drllm_fast.report import plot_plan

        return plot_plan(self.stats, path, **kwargs)

    # -- what to do next, in this thread --------------------------------------------------------------------------
    @contextmanager
    def using(self, plan: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Iterator[None]:
        """Force paths: prompts that are prefilled inside follow `plan` ([L], or [P, L] as in `GivenPlan`)."""
        given = GivenPlan(plan)
        check_length(given.plan, self.num_layers)
        with self._set(plan=given):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The dense model, as it was before routing was enabled."""
        with self._set(disabled=True):
            yield

    @contextmanager
    def context(self, lengths: Sequence[int] | Tensor) -> Iterator[None]:
        """Route on the first lengths[b] tokens of row b only (its context), whatever follows them in the same forward.

        Lengths count real tokens. Used to score answer choices: the answer must not choose the network."""
        lengths = tuple(int(n) for n in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"context lengths must be one positive integer for each row, given {lengths}")
        with self._set(context=lengths):
            yield

    @property
    def _settings(self) -> Settings:
        return _SETTINGS.get().get(id(self), _NO_SETTINGS)

    @contextmanager
    def _set(self, **changes) -> Iterator[None]:
        settings = replace(self._settings, **changes)
        token = _SETTINGS.set({**_SETTINGS.get(), id(self): settings})
        try:
            yield
        finally:
            _SETTINGS.reset(token)

    # -- one forward of the base model ------------------------------------------------------------------------------
    def forward(
        self,
        base: nn.Module,
        dense,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """Hugging Face's base-model forward `dense`, on packed tokens and routed layers."""
        settings = self._settings
        if settings.disabled:
            return self._dense(dense, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs)
        x = _one_input(input_ids, inputs_embeds)
        self._refuse(base, attention_mask, position_ids, past_key_values, x, kwargs)
        use_cache = base.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        fresh = not isinstance(cache, RoutedCache)
        if cache is None and use_cache:
            cache = RoutedCache(base.config)
        past_columns = 0 if fresh or cache is None else cache.columns

        batch, columns = x.shape[:2]
        past = cache.lengths if past_columns else [0] * batch
        if len(past) != batch:
            raise ValueError(f"the cache holds {len(past)} rows, the input has {batch}")
        if past_columns and cache.model() is not base:
            raise ValueError("this cache was filled by another model; start with a new cache")
        real = real_columns(attention_mask, batch, columns, None if fresh else cache)
        packed = PackedBatch(real, batch, columns, x.device)
        if position_ids is None or settings.count_positions:
            packed_positions = packed.positions(past)
        else:
            packed_positions = packed.pack(position_ids.expand(batch, -1)[:, -columns:])
        ids = None if input_ids is None else packed.pack(input_ids)
        embeds = None if inputs_embeds is None else packed.pack(inputs_embeds)

        if past_columns:
            self._check_kept_plan(settings, cache)
            policy, prompt_lengths = None, packed.lengths
        else:
            policy = settings.plan or self.policy
            prompt_lengths = self._prompt_lengths(settings, packed, real)
            if past_key_values is not None and fresh:
                RoutedCache.convert(cache, self.num_layers)
        run = RoutedForward(
            self, packed, past, self.num_layers, cache, policy, prompt_lengths, None if ids is None else ids[0]
        )
        token = ACTIVE.set(run)
        try:
            outputs = dense(
                input_ids=ids,
                attention_mask=_no_mask(x.device),
                position_ids=packed_positions,
                past_key_values=cache,
                inputs_embeds=embeds,
                use_cache=use_cache,
                **kwargs,
            )
        except BaseException:
            if cache is not None and not past_columns:
                cache.reset()
            raise
        finally:
            ACTIVE.reset(token)

        if cache is not None:
            if not past_columns:
                cache.fix(run.plan, policy)
                cache.model = weakref.ref(base)
            cache.advance(packed.lengths, columns, real)
        self._last = Tally.add(run, cache, continued=bool(past_columns))
        return _unpacked(outputs, packed)

    def _dense(self, dense, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs):
        if isinstance(past_key_values, RoutedCache) and past_key_values.columns:
            raise ValueError(
                "this cache was filled by the routed model, and routing is switched off here; start with a new cache"
            )
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
        }  # fmt: skip
        token = ACTIVE.set(None)
        try:
            return dense(**given, **kwargs)
        finally:
            ACTIVE.reset(token)

    def _refuse(self, base, attention_mask, position_ids, cache, x, kwargs) -> None:
        """Whatever would run and be silently wrong. Nothing has been changed yet."""
        if base.config._attn_implementation != self._attention:
            raise RuntimeError(
                f"the attention implementation was changed to {base.config._attn_implementation!r} while routing is "
                "on; call model.disable_dynamic_routing(), change it, and enable routing again"
            )
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise NotImplementedError(
                f"attention_mask of {shape}: a routed model takes a mask [batch, columns] of ones and zeros (or none); "
                "custom 4D masks are not supported"
            )
        if position_ids is not None and position_ids.ndim != 2:
            raise NotImplementedError(f"position_ids must be [batch, columns], given {tuple(position_ids.shape)}")
        for name in ("output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(base.config, name, False)):
                raise NotImplementedError(f"{name}=True is not supported by a routed model; use `routing.disabled()`")
        if base.training and any(getattr(layer, "gradient_checkpointing", False) for layer in base.layers):
            raise NotImplementedError("gradient checkpointing is not supported while routing is on; disable one of them")
        packed = sorted({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "block_table", "cache"} & kwargs.keys())
        if any(kwargs[name] is not None for name in packed):
            raise NotImplementedError(
                f"{', '.join(packed)}: packed input and continuous batching are not supported by a routed model; give "
                "padded rows with an attention_mask (they are packed inside)"
            )
        if attention_mask is None and position_ids is not None and position_ids.shape[1] > 1:
            if bool((position_ids.diff(dim=1) != 1).any()):
                raise NotImplementedError(
                    "position_ids that do not count up by one, without an attention_mask, mean packed sequences; give "
                    "padded rows with an attention_mask instead (they are packed inside)"
                )
        per_token = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.shape[:2] == x.shape[:2] and v.ndim > 1]
        if per_token:
            raise NotImplementedError(f"{', '.join(per_token)}: per-token arguments are not supported by a routed model")
        if cache is not None and not isinstance(cache, RoutedCache):
            check_convertible(cache)

    def _prompt_lengths(self, settings: Settings, packed: PackedBatch, real: Tensor | None) -> list[int]:
        """How many tokens of each row the policy may see."""
        if 0 in packed.lengths:
            row = packed.lengths.index(0)
            raise ValueError(f"row {row} has no tokens: its attention_mask is all zeros; remove the row")
        if settings.context is not None:
            lengths = settings.context
            if packed.batch % len(lengths):
                raise ValueError(f"{len(lengths)} context lengths for a batch of {packed.batch} rows; give one for each")
            lengths = [n for n in lengths for _ in range(packed.batch // len(lengths))]
            for row, (given, length) in enumerate(zip(lengths, packed.lengths, strict=True)):
                if given > length:
                    raise ValueError(f"context length {given} of row {row} exceeds its {length} tokens")
            return lengths
        columns = settings.prompt_columns
        if columns is None or columns >= packed.columns:
            return packed.lengths
        return [columns] * packed.batch if real is None else real[:, :columns].sum(1).tolist()

    def _check_kept_plan(self, settings: Settings, cache: RoutedCache) -> None:
        if settings.plan is None or settings.plan is cache.decided_by:
            return
        if not torch.equal(settings.plan.expand(len(cache.lengths)), cache.plan):
            raise ValueError(
                "routing.using(plan) was given another plan than the one this cache was filled under; a path is kept "
                "for as long as its cache is, so start with a new cache"
            )

_NO_SETTINGS = Settings()


def set_budget(policy: RoutingPolicy, budget: float) -> None:
    """Set a policy's budget; TypeError / ValueError if it has none."""
    if not hasattr(policy, "budget"):
        raise ValueError(
            f"{type(policy).__name__} keeps no budget: its paths are fixed or its routers are not calibrated; give a "
            "path with fewer blocks, or a policy with a budget such as drllm_fast.StaticPolicy"
        )
    policy.budget = budget


def real_columns(mask: Tensor | None, batch: int, columns: int, cache: RoutedCache | None) -> Tensor | None:
    """Which of the new columns are real: bool [B, S], or None when all are. Checks the part the cache has seen."""
    past = 0 if cache is None else cache.columns
    if mask is None:
        if cache is not None and cache.real is not None and past:
            raise ValueError("the rows in the cache were padded: give the attention_mask of all columns, old and new")
        return None
    if mask.shape != (batch, past + columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {past + columns}): one entry for each of "
            f"the {past} columns in the cache and of the {columns} new ones"
        )
    mask = mask.to(torch.bool)
    if bool(mask.all()) and (cache is None or cache.real is None):
        return None
    if past:
        seen = mask[:, :past].cpu()
        if not (bool(seen.all()) if cache.real is None else torch.equal(seen, cache.real)):
            raise ValueError(
                "the attention_mask hides or shows other past columns than when they were run; the keys are in the "
                "cache already, so start with a new cache"
            )
        mask = mask[:, past:]
        if bool(mask.all()):
            return None
    return mask


def _one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    x = input_ids if input_ids is not None else inputs_embeds
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"an empty batch of shape {tuple(x.shape)}")
    return x


def _no_mask(device: torch.device) -> Tensor:
    # A mask that is 4D already is passed on as it is: no time is spent on making one, and none is ever read.
    return torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)


def _unpacked(outputs, packed: PackedBatch):
    for name in ("last_hidden_state", "hidden_states"):
        value = outputs.get(name) if hasattr(outputs, "get") else None
        if isinstance(value, Tensor):
            outputs[name] = packed.unpack(value)
        elif value is not None:
            outputs[name] = tuple(None if h is None else packed.unpack(h) for h in value)
    return outputs
