"""`drllm-fast search`: from a task to stored paths and their report."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
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
    spread = "spread"


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


TASK, SEARCH, FINER, RUN = "The task", "The search", "Finer points of the search", "How it runs"


def search(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; the bundled one: {SMOLLM2}.")],
    task: Annotated[
        str,
        typer.Option(
            help="FILE.jsonl or .jsonl.gz; synth_arith or synth_arith:1-2; text:FILE.txt or sentences:FILE.txt; each "
            "with :train or :validation for a part of it; hf:NAME, hf:NAME:CONFIG:SPLIT."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command goes on where it stopped.")],
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first so many prompts; may be raised later.", rich_help_panel=TASK),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Only these levels: 1-2 or 1,4.", rich_help_panel=TASK)] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before a question; default: the form's.", rich_help_panel=TASK),
    ] = None,
    examples: Annotated[
        str | None, typer.Option(help="Another task to take solved examples from.", rich_help_panel=TASK)
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="Prompt form: question, letters, verbatim, or a task's name.", rich_help_panel=TASK),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="Where data is laid out otherwise: question=COLUMN, choices=COLUMN, answer=COLUMN; once for each.",
            rich_help_panel=TASK,
        ),
    ] = None,
    drop_unanswered: Annotated[
        bool, typer.Option("--drop-unanswered", help="Leave out rows whose answer is empty.", rich_help_panel=TASK)
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the chat template.", rich_help_panel=TASK)
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a free answer; default: the form's.", rich_help_panel=TASK)
    ] = None,
    grader: Annotated[
        str,
        typer.Option(
            help="Of free answers: exact, first-word, math-verify, mathruler; auto: what suits the task.",
            rich_help_panel=TASK,
        ),
    ] = "auto",
    method: Annotated[Method, typer.Option(help="How paths are looked for.", rich_help_panel=SEARCH)] = Method.mcts,
    simulations: Annotated[
        int, typer.Option(min=0, help="Paths tried for a prompt, at most.", rich_help_panel=SEARCH)
    ] = 50,
    reward: Annotated[
        Reward,
        typer.Option(
            help="What a path is worth. exact: a right answer; agreement: as soon as --agree paths are right; margin: "
            "lead of the right choice; loglik: log-likelihood of the right answer; kl: likeness to all blocks.",
            rich_help_panel=SEARCH,
        ),
    ] = Reward.exact,
    agree: Annotated[
        int, typer.Option(min=1, help="Paths that must agree, for the reward agreement.", rich_help_panel=SEARCH)
    ] = 3,
    prior: Annotated[
        str, typer.Option(help="Which edits come first: none, block-influence, cka or kl.", rich_help_panel=SEARCH)
    ] = "none",
    early_stop: Annotated[
        bool,
        typer.Option(
            help="Stop at a path that repairs a wrong answer, or keeps a right one and saves enough.",
            rich_help_panel=SEARCH,
        ),
    ] = True,
    control: Annotated[
        bool, typer.Option(help="Search towards a wrong answer, too, for comparison.", rich_help_panel=SEARCH)
    ] = True,
    probes: Annotated[
        int, typer.Option(min=0, help="Single edits drawn at random for each prompt.", rich_help_panel=SEARCH)
    ] = 8,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, help="Of the search, of drawn examples and of synth_arith.", rich_help_panel=SEARCH
        ),
    ] = 0,
    max_length: Annotated[
        float,
        typer.Option(min=1, max=2, help="Blocks run by a path, at most, as a multiple of all.", rich_help_panel=FINER),
    ] = 2.0,
    leaves: Annotated[int, typer.Option(min=1, help="Paths that one search tries at once.", rich_help_panel=FINER)] = 4,
    exploration: Annotated[float, typer.Option(min=0, help="mcts: c of the UCB formula.", rich_help_panel=FINER)] = 1.8,
    length_penalty: Annotated[
        float, typer.Option(min=0, help="mcts: lambda of the UCB formula.", rich_help_panel=FINER)
    ] = 3.0,
    random_child: Annotated[
        float, typer.Option(min=0, max=1, help="mcts: probability of a random child.", rich_help_panel=FINER)
    ] = 0.1,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, an option of the method; a wrong name lists them. May be repeated.", rich_help_panel=FINER
        ),
    ] = None,
    executor: Annotated[
        Executor,
        typer.Option(
            help="local: this process; torchrun: a rank, started with `torchrun -m drllm_fast.cli search ...`; "
            "ray: Ray actors.",
            rich_help_panel=RUN,
        ),
    ] = Executor.local,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors.", rich_help_panel=RUN)] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; by default one of its own.", rich_help_panel=RUN)
    ] = None,
    together: Annotated[
        int, typer.Option(min=1, help="Prompts searched side by side in a worker.", rich_help_panel=RUN)
    ] = 16,
    state_memory: Annotated[
        float, typer.Option(min=0, help="GB of states kept between forwards.", rich_help_panel=RUN)
    ] = 1.0,
    store: Annotated[
        StoreKind, typer.Option(help="auto: Parquet on shared disks, else SQLite.", rich_help_panel=RUN)
    ] = StoreKind.auto,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.", rich_help_panel=RUN)] = Dtype.auto,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...", rich_help_panel=RUN)
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of torch in each worker.", rich_help_panel=RUN)
    ] = None,
) -> None:
    """Search layer paths for the prompts of a task, store them, and report what was found.

    For a first look: drllm-fast search --model smollm2-135m-instruct --task synth_arith:1 --limit 8 --output found
    """
    from drllm_fast.search.prompts import grader_of
    from drllm_fast.search.tasks import load_rows, load_task
    from drllm_fast.search.unit import SearchConfig

    check_model(model)
    config = SearchConfig(
        method=method.value, simulations=simulations, reward=reward.value, exploration=exploration,
        length_penalty=length_penalty, random_child=random_child, max_length=max_length, early_stop=early_stop,
        leaves=leaves, prior=prior, grader=grader, agree=agree, control=control, probes=probes,
        max_new_tokens=max_new_tokens, options=dict(map(_option, option or [])),
    )  # fmt: skip
    fields = dict(_pair(text, "--field") for text in field) if field else None
    _check_config(config)
    _check_executor(executor.value, workers, ray_address)
    if executor is not Executor.ray:
        find_device(device)

    rows = load_rows(task, seed=seed, fields=fields)
    loader = WorkerMaker(model, dtype.value, device, threads, config, "", seed, together, int(state_memory * 1e9))
    loaded = loader.load() if chat else None  # the template is the tokenizer's
    if loaded and not loaded[1].chat_template:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template; use --no-chat")
    given = {"shots": shots, "levels": levels, "seed": seed, "form": form, "chat": chat, "fields": fields}
    items = load_task(
        task, rows=rows, tokenizer=loaded and loaded[1], limit=limit, examples=examples,
        drop_unanswered=drop_unanswered, **given,
    )  # fmt: skip
    if grader == "auto":
        forms = {row["id"]: form or row["form"] for row in rows}
        config = _with_grader(config, {grader_of(forms[item.id]) for item in items if item.choices is None})
    # A file's folder says nothing on another machine, its name nothing of what is in it.
    given |= {"task": Path(task).name, "content": _digest(rows), "examples": None}
    if examples:
        shown = _digest(load_rows(examples, seed=seed, fields=fields))
        given |= {"examples": Path(examples).name, "examples_content": shown}
    run_search(
        replace(loader, config=config),
        loaded,
        items,
        given,
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
    """Search the items into the folder `output`; when all are there but those that failed, write and print the report.

    loader  its model_hash is not looked at: the store's is taken
    loaded  what `loader.load()` gave, if it was called already
    task    what the items are, fit for JSON, for the folder's manifest
    """
    from drllm_fast import fingerprint
    from drllm_fast.search.grading import check_grader
    from drllm_fast.search.manifest import Manifest, check_folder
    from drllm_fast.search.progress import SearchProgress
    from drllm_fast.search.rewards import check_reward
    from drllm_fast.search.store import open_store
    from drllm_fast.search.work import UnitsFailed, unfinished, work_units

    config = loader.config
    check_grader(config.grader)
    for item in items:
        check_reward(config, item)
    of = functools.partial(Manifest.of, model=loader.model, config=config, task=task, seed=loader.seed)
    check_folder(output, of(fingerprint={}))  # what can be said without the model
    if executor == "torchrun" and find_device(loader.device) == "cuda":
        loader = replace(loader, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    # Ray's actors load their own, on their devices.
    loaded = loaded or (replace(loader, device="cpu") if executor == "ray" else loader).load()
    manifest = of(fingerprint=fingerprint.fingerprint(loaded[0]))
    with open_store(output, manifest, store_kind, check=functools.partial(fingerprint.check, loaded[0])) as store:
        make = replace(loader, model_hash=store.manifest.model_hash)
        units = work_units(items, store.manifest.model_hash, config, loader.seed)
        found = len(units) - len(unfinished(units, store.done()))
        typer.echo(
            f"{len(units)} prompts, {found} of them searched before; results go to {output} ({store.kind})", err=True
        )
        if executor == "ray":
            loaded = None
        try:
            with SearchProgress(len(units), found=found) as progress:
                complete = _execute(make, loaded, units, store, progress, executor, workers, ray_address)
        except UnitsFailed as error:
            left = unfinished(units, store.done())
            if len(left) < len(units) and all(unit.key.text() in error.failed for unit in left):
                report(store, output)  # of the others
            raise
        if complete:
            report(store, output)


def _execute(
    make: WorkerMaker,
    loaded: tuple[Any, Any] | None,
    units: list[Any],
    store: Any,
    progress: Any,
    executor: str,
    workers: int,
    ray_address: str | None,
) -> bool:
    """Search the units that are left; whether all are stored then, and the report is this process's to make."""
    from drllm_fast.search.executors import rank_and_world, run_local, run_ranks

    if executor == "ray":
        from drllm_fast.search.ray_executor import run_ray

        if Path(make.model).is_dir():  # the actors may run in another folder
            make = replace(make, model=str(Path(make.model).resolve()))
        gpus = {"cpu": 0.0, "auto": None}.get(make.device, 1.0)  # auto: the cluster's machines, not this one, decide
        return run_ray(
            make, units, store, workers=workers, address=ray_address, num_gpus=gpus, num_cpus=make.threads or 1,
            chunk=2 * make.together, progress=progress,
        ).complete  # fmt: skip
    here = functools.partial(make, loaded)
    if executor == "torchrun":
        outcome = run_ranks(here, units, store, chunk=2 * make.together, progress=progress)
        # The rank that stores the last unit reports; of ranks that found nothing to do, the first one.
        return outcome.complete and (outcome.finished > 0 or rank_and_world()[0] == 0)
    return run_local(here, units, store, chunk=8 * make.together, progress=progress).complete


def report(store: Any, output: Path) -> None:
    """Write the paths and the report of a store beside it, and print the report."""
    from drllm_fast.search.report import SearchReport
    from drllm_fast.search.report_paths import write_paths

    rows = store.export(output / "paths.parquet")
    # The same without a word of the data, for where that may not be published.
    write_paths(output / "paths.csv.gz", store.results(), label_free=store.manifest.config["reward"] == "kl")
    made = SearchReport.of(store.results(), manifest=store.manifest)
    files = made.write(output)
    typer.echo(made.text())
    typer.echo(f"{rows} prompts in {output / 'paths.parquet'}; the report is in {', '.join(map(str, files))}", err=True)


def _check_config(config: Any) -> None:
    """ValueError for what no search could be made of, whatever the model."""
    from drllm_fast.search.base import Outcome
    from drllm_fast.search.grading import check_grader
    from drllm_fast.search.priors import PRIORS
    from drllm_fast.search.searcher import make_searcher

    if config.prior not in PRIORS:
        raise ValueError(f"--prior {config.prior}: write {', '.join(PRIORS[:-1])} or {PRIORS[-1]}")
    if config.grader != "auto":
        check_grader(config.grader)
    make_searcher(replace(config, prior="none"), 2, Outcome(0.0, False), 0)


def _check_executor(executor: str, workers: int, ray_address: str | None) -> None:
    """ValueError or ImportError where it cannot run or store, or is given what is another one's."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError('paths are stored with pyarrow: pip install "drllm-fast[search]"')
    if executor == "ray":
        import drllm_fast.search.ray_executor  # noqa: F401
    elif workers > 1 or ray_address is not None:
        raise ValueError("--workers and --ray-address are of --executor ray; ranks are the launcher's: torchrun")
    elif executor == "torchrun":
        from drllm_fast.search.executors import rank_and_world

        rank_and_world()
    elif "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("this is one of several ranks, and each would search all prompts; add --executor torchrun")


def _digest(rows: list[dict[str, Any]]) -> str:
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
