"""`drllm-fast search`: from a task to stored paths and their report."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model


class Method(str, Enum):
    mcts = "mcts"
    beam = "beam"
    policy_gradient = "policy-gradient"
    random = "random"
    chain = "chain"


class Reward(str, Enum):
    exact = "exact"
    agreement = "agreement"
    margin = "margin"
    loglik = "loglik"
    kl = "kl"


class Executor(str, Enum):
    local = "local"
    torchrun = "torchrun"
    ray = "ray"


class StoreKind(str, Enum):
    auto = "auto"
    sqlite = "sqlite"
    parquet = "parquet"


@dataclass(frozen=True)
class WorkerMaker:
    """Makes a worker, in whatever process it is sent to."""

    model: str
    dtype: str
    device: str
    threads: int | None
    config: Any
    model_hash: str
    seed: int
    together: int
    state_bytes: int

    def load(self) -> tuple[Any, Any]:
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        return load_model(self.model, Dtype(self.dtype), find_device(self.device))

    def __call__(self, loaded: tuple[Any, Any] | None = None) -> Any:
        from drllm_fast.search.evaluator import PathEvaluator
        from drllm_fast.search.priors import edit_prior
        from drllm_fast.search.worker import SearchWorker

        model, tokenizer = loaded or self.load()
        return SearchWorker(
            PathEvaluator(model, tokenizer, store_bytes=self.state_bytes),
            self.config,
            model_hash=self.model_hash,
            seed=self.seed,
            prior=edit_prior(model, tokenizer, self.config.prior),
            together=self.together,
        )


def search(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; {SMOLLM2} is the one of the demo.")],
    task: Annotated[
        str, typer.Option(help="FILE.jsonl[.gz] | synth_arith[:LEVELS] | hf:DATASET[:CONFIG][:SPLIT]; see the README.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command goes on where it stopped.")],
    method: Annotated[Method, typer.Option(help="How paths are looked for.")] = Method.mcts,
    simulations: Annotated[int, typer.Option(min=0, help="Paths tried for a prompt, at most.")] = 50,
    reward: Annotated[Reward, typer.Option(help="What a path is worth; see drllm_fast.search.rewards.")] = Reward.exact,
    executor: Annotated[Executor, typer.Option(help="local, a rank of torchrun, or Ray actors.")] = Executor.local,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
    levels: Annotated[str | None, typer.Option(help="Only these levels: 1-2 or 1,4.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples; default: as the task has it.")] = None,
    examples: Annotated[str | None, typer.Option(help="Another task to take solved examples from.")] = None,
    form: Annotated[str | None, typer.Option(help="Prompt form, instead of the task's.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="question=COLUMN, choices=COLUMN, answer=COLUMN of other data.")
    ] = None,
    drop_unanswered: Annotated[
        bool, typer.Option("--drop-unanswered", help="Leave out rows whose answer is empty.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of a free answer.")] = None,
    grader: Annotated[str, typer.Option(help="Of free answers; auto is what suits the task.")] = "auto",
    control: Annotated[bool, typer.Option(help="Search towards a wrong answer, too, for comparison.")] = True,
    early_stop: Annotated[bool, typer.Option(help="Stop a search as the paper does.")] = True,
    probes: Annotated[int, typer.Option(min=0, help="Single edits drawn at random for each prompt.")] = 8,
    agree: Annotated[int, typer.Option(min=1, help="Paths that must agree, for the reward agreement.")] = 3,
    prior: Annotated[str, typer.Option(help="Which edits come first: none, block-influence or cka.")] = "none",
    exploration: Annotated[float, typer.Option(help="c of the UCB formula.")] = 1.8,
    length_penalty: Annotated[float, typer.Option(help="lambda of the UCB formula.")] = 3.0,
    random_child: Annotated[float, typer.Option(help="Probability of a random child.")] = 0.1,
    max_length: Annotated[float, typer.Option(help="Visits of a path at most, as a multiple of L.")] = 2.0,
    leaves: Annotated[int, typer.Option(min=1, help="Paths that one search tries at once.")] = 4,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, an option of the method.")] = None,
    together: Annotated[int, typer.Option(min=1, help="Prompts searched side by side in a worker.")] = 16,
    state_memory: Annotated[float, typer.Option(min=0, help="GB of states kept between forwards.")] = 1.0,
    store: Annotated[StoreKind, typer.Option(help="auto: Parquet on shared disks, else SQLite.")] = StoreKind.auto,
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster; by default one of its own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search and of drawn examples.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch in each worker.")] = None,
) -> None:
    """Search layer paths for the prompts of a task, store them, and report what was found."""
    from drllm_fast.search.prompts import grader_of
    from drllm_fast.search.unit import SearchConfig

    check_model(model)
    config = SearchConfig(
        method=method.value, simulations=simulations, reward=reward.value, exploration=exploration,
        length_penalty=length_penalty, random_child=random_child, max_length=max_length, early_stop=early_stop,
        leaves=leaves, prior=prior, grader=grader, agree=agree, control=control, probes=probes,
        max_new_tokens=max_new_tokens, options=dict(map(_option, option or [])),
    )  # fmt: skip
    from drllm_fast.search.tasks import load_task

    loader = WorkerMaker(model, dtype.value, device, threads, config, "", seed, together, int(state_memory * 1e9))
    loaded = loader.load() if chat else None  # the template is the tokenizer's
    given = {
        "shots": shots, "levels": levels, "seed": seed, "form": form, "examples": examples, "chat": chat,
        "fields": dict(_pair(text, "--field") for text in field) if field else None,
    }  # fmt: skip
    items = load_task(task, tokenizer=loaded and loaded[1], limit=limit, drop_unanswered=drop_unanswered, **given)
    if grader == "auto":
        config = _with_grader(config, {grader_of(form or item.task) for item in items if item.choices is None})
    run_search(
        replace(loader, config=config),
        loaded,
        items,
        given | {"task": Path(task).name},  # a file's folder says nothing on another machine
        output,
        executor=executor.value,
        workers=workers,
        store_kind=store.value,
        ray_address=ray_address,
    )


def run_search(
    loader: WorkerMaker,
    loaded: tuple[Any, Any] | None,
    items: list[Any],
    task: dict[str, Any],
    output: Path,
    *,
    executor: str = "local",
    workers: int = 1,
    store_kind: Any = "auto",
    ray_address: str | None = None,
) -> None:
    """Search the items into the folder `output`; when all are there, write and print the report.

    loader  its model_hash is not looked at: the store's is taken
    loaded  what `loader.load()` gave, if it was called already
    task    what the items are, fit for JSON, for the folder's manifest
    """
    from drllm_fast import fingerprint
    from drllm_fast.search.executors import run_local, run_ranks
    from drllm_fast.search.grading import check_grader
    from drllm_fast.search.manifest import Manifest
    from drllm_fast.search.progress import SearchProgress
    from drllm_fast.search.rewards import check_reward
    from drllm_fast.search.store import open_store
    from drllm_fast.search.work import unfinished, work_units

    config = loader.config
    check_grader(config.grader)
    for item in items:
        check_reward(config, item)
    loaded = loaded or loader.load()
    manifest = Manifest.of(
        model=loader.model, fingerprint=fingerprint.fingerprint(loaded[0]), config=config, task=task, seed=loader.seed
    )
    with open_store(output, manifest, store_kind, check=functools.partial(fingerprint.check, loaded[0])) as store:
        make = replace(loader, model_hash=store.manifest.model_hash)
        units = work_units(items, store.manifest.model_hash, config, loader.seed)
        found = len(units) - len(unfinished(units, store.done()))
        typer.echo(
            f"{len(units)} prompts, {found} of them searched before; results go to {output} ({store.kind})", err=True
        )
        with SearchProgress(len(units), found=found) as progress:
            if executor == "ray":
                from drllm_fast.search.ray_executor import run_ray

                loaded = None  # the actors load their own
                gpus = 1.0 if find_device(loader.device).startswith("cuda") else 0.0
                outcome = run_ray(
                    make, units, store, workers=workers, address=ray_address, num_gpus=gpus,
                    num_cpus=loader.threads or 1, chunk=2 * loader.together, progress=progress,
                )  # fmt: skip
            elif executor == "torchrun":
                make = functools.partial(make, loaded)
                outcome = run_ranks(make, units, store, chunk=2 * loader.together, progress=progress)
            else:
                outcome = run_local(
                    functools.partial(make, loaded), units, store, chunk=8 * loader.together, progress=progress
                )
        if outcome.complete:
            report(store, output)


def report(store: Any, output: Path) -> None:
    """Write the paths and the report of a store beside it, and print the report."""
    from drllm_fast.search.report import SearchReport

    rows = store.export(output / "paths.parquet")
    made = SearchReport.of(store.results(), manifest=store.manifest)
    files = made.write(output)
    typer.echo(made.text())
    typer.echo(f"{rows} prompts in {output / 'paths.parquet'}; the report is in {', '.join(map(str, files))}", err=True)


def _with_grader(config: Any, graders: set[str]) -> Any:
    """The configuration with the grader that suits the task."""
    if len(graders) > 1:
        raise ValueError(f"the answers want different graders ({', '.join(sorted(graders))}); choose one: --grader")
    return replace(config, grader=graders.pop() if graders else "exact")


def _pair(text: str, name: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise typer.BadParameter(f"{name} {text}: write NAME=VALUE")
    return key, value


def _option(text: str) -> tuple[str, Any]:
    key, value = _pair(text, "--option")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
