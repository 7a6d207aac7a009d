"""Answering the prompts of a Ray Dataset: a stage of actors, each with a model of its own.

    from drllm_fast.generation.ray_data import generate_dataset

    ds = ray.data.read_json("prompts.jsonl", lines=True)
    answers = generate_dataset(ds, model="smollm2-135m-instruct", policy="smollm2-135m-instruct", budget=0.9, actors=4)
    answers.write_json("answers")

Rows say what `drllm_fast.generation.prompt_rows` says; their columns stay, and those of the answer join them.

- Actors must not take all CPUs of the cluster: the tasks that read and write the data need some as well, and Ray waits
  for ever where they get none. A dataset of actors that leaves none is warned of.
- A row that cannot be answered ends the job, with the row in the error, unless
  `ray.data.DataContext.get_current().max_errored_blocks` lets blocks go.
- Ray answers a block again when its actor died. Answers depend on the row alone, so that they are the same.
- Rows draw alike where they have no seed of their own: give them a column `seed`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from drllm_fast.enable import enable_dynamic_routing
from drllm_fast.generation.prompt_rows import answer_rows, check_row, encode_rows
from drllm_fast.generation.sampling import Sampling

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

try:
    import pyarrow as pa
    import ray
    import ray.data
except ImportError as error:
    raise ImportError('Ray Data is not installed: pip install "drllm-fast[ray]"') from error

log = logging.getLogger(__name__)
Load = Callable[[], tuple[Any, Any]]
COLUMNS = {
    "text": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "path": pa.list_(pa.int8()),
    "visits": pa.int32(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "seconds": pa.float64(),
}  # as of `Generation`


class GenerateStage:
    """A class for `Dataset.map_batches`, with batch_format="pyarrow". It loads the model once, in the actor.

        ds.map_batches(GenerateStage, fn_constructor_kwargs={"model": "my/model"}, batch_format="pyarrow",
                       batch_size=256, compute=ray.data.ActorPoolStrategy(size=2), num_gpus=1)

    The arguments are those of `generate_dataset`, which does this.
    """

    def __init__(
        self,
        model: str | Load,
        policy: Any = None,
        *,
        budget: float | None = None,
        sampling: Sampling | None = None,
        chat: bool | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_batch: int = 64,
        prefix: str = "",
    ):
        self.sampling = Sampling() if sampling is None else sampling
        self.chat, self.max_batch, self.prefix = chat, max_batch, prefix
        self.model, self.tokenizer = model() if callable(model) else _loaded(model, dtype, device)
        if policy is not None:
            enable_dynamic_routing(self.model, policy, budget=budget)

    def __call__(self, batch: pa.Table) -> pa.Table:
        names = {name: self.prefix + name for name in COLUMNS}
        if taken := [name for name in names.values() if name in batch.column_names]:
            raise ValueError(
                f"the dataset has a column {taken[0]!r} already, by the name of one of the answers; drop it, or give a "
                "prefix, such as prefix='answer_'"
            )
        rows = [
            check_row(row, f"the row {_short(row)}", line, self.sampling) for line, row in enumerate(batch.to_pylist())
        ]
        tokens = encode_rows(self.model, self.tokenizer, rows, chat=self.chat)
        answers = list(
            answer_rows(self.model, self.tokenizer, rows, tokens, stream="ordered", max_batch=self.max_batch)
        )
        for name, kind in COLUMNS.items():
            batch = batch.append_column(names[name], pa.array([getattr(a, name) for a in answers], type=kind))
        return batch


def generate_dataset(
    ds: ray.data.Dataset,
    *,
    model: str | Load,
    policy: Any = None,
    budget: float | None = None,
    sampling: Sampling | None = None,
    chat: bool | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_batch: int = 64,
    prefix: str = "",
    actors: int | tuple[int, int] = 1,
    batch_size: int = 1024,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    **options: Any,
) -> ray.data.Dataset:
    """The dataset with the columns of its answers: text, tokens, path, visits, finish_reason, prompt_tokens, seconds.

    model       folder, hub id or bundled name, which each actor loads from where it runs; or a function without
                arguments that returns a model and its tokenizer
    policy      as for `enable_dynamic_routing`, likewise budget; None runs every block once
    sampling    of what rows do not say
    chat        whether texts are users' messages in the chat template; by default if the tokenizer has one
    dtype       and device: "auto" is the checkpoint's own, and a GPU where the actor has one
    max_batch   rows that decode together
    prefix      of the new columns
    actors      how many, or the least and the most of a pool that grows
    batch_size  rows that an actor is given at once. It answers all of them before it begins the next, so some times
                max_batch, or the last rows of each decode alone
    num_cpus    and num_gpus: of each actor; see above on CPUs
    options     of `Dataset.map_batches`: resources, accelerator_type, memory, ...

    Nothing runs until the dataset is used. Raises TypeError or ValueError for what is wrong with the arguments.
    """
    if not isinstance(ds, ray.data.Dataset):
        raise TypeError(f"ds must be a Ray Dataset, got {type(ds).__name__}; make one with ray.data.from_items(rows)")
    least, most = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= least <= most:
        raise ValueError(f"actors must be a number from 1 up, or the least and the most of them, got {actors}")
    if not isinstance(model, str | os.PathLike) and not callable(model):
        raise TypeError(
            f"model must be a folder, hub id or bundled name, or a function that makes one, got {type(model).__name__}"
        )
    model, policy = _absolute(model), _absolute(policy)
    cpus = ray.cluster_resources().get("CPU", 0) if ray.is_initialized() else None
    if cpus is not None and most * num_cpus >= cpus:
        log.warning(
            "%d actors of %g CPUs leave none of the cluster's %g to the tasks that read and write; unless it grows, "
            "the job will wait for ever. Take fewer actors, or a smaller num_cpus",
            most, num_cpus, cpus,
        )  # fmt: skip
    return ds.map_batches(
        GenerateStage,
        fn_constructor_kwargs={
            "model": model, "policy": policy, "budget": budget, "sampling": sampling, "chat": chat, "dtype": dtype,
            "device": device, "max_batch": max_batch, "prefix": prefix,
        },
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        udf_modifying_row_count=False,
        **options,
    )  # fmt: skip


def _absolute(name: Any) -> Any:
    """A path that is there, for actors run in another folder; all else as it is."""
    return os.path.abspath(name) if isinstance(name, str | os.PathLike) and os.path.exists(name) else name


def _loaded(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drllm_fast import smollm2

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name.lower() == smollm2.NAME:
        model, tokenizer = smollm2.load_smollm2(torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), tokenizer


def _short(row: dict[str, Any]) -> str:
    return repr({name: value for name, value in row.items() if value is not None})[:120]
