"""`drllm-fast train` on what `drllm-fast search` stored, on a tiny random Llama."""

import json
import signal
import time

import pytest
import torch
from cli_cases import LAYERS, call, contents, ended, quiz, refused, results, start, tiny_folder

import drllm_fast
from drllm_fast import LayerRouters, cli_train
from drllm_fast.cli_models import Dtype, load_model
from drllm_fast.training import fit as fit_module
from drllm_fast.training.examples import load_examples, targets_of, training_set_hash
from drllm_fast.training.fit import fit
from drllm_fast.training.fit_config import FitConfig
from drllm_fast.training.windows import pool_examples

pytest.importorskip("pyarrow")
COUNT = 40  # prompts of a search
QUICK = ("--epochs", 3, "--batch-size", 4, "--router-size", 8, "--windows", 3, "--tracker", "none", "--threads", 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A model, another one, and searches of the first."""
    folder = tmp_path_factory.mktemp("found")
    models = [tiny_folder(folder / name, seed=seed) for seed, name in enumerate(("tiny", "other"))]
    stores = []
    for name in ("first", "second"):
        task = quiz(folder / f"{name}.jsonl", COUNT, seed=len(stores))
        options = ("--simulations", 30, "--threads", 1, "--no-control", "--probes", 1)
        ended(call("search", "--model", models[0], "--task", task, "--output", folder / name, *options))
        stores.append(folder / name)
    return *models, *stores


def train(model, stores, output, *more):
    named = [text for store in stores for text in ("--paths", store)]
    return call("train", "--model", model, *named, "--output", output, *QUICK, *more)


def weights(folder):
    return LayerRouters.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_ends_with_a_checkpoint_and_its_report(found, tmp_path):
    tiny, _, first, _ = found
    output = tmp_path / "routers"
    result = ended(train(tiny, [first], output))
    model, tokenizer = load_model(str(tiny), Dtype.auto, "cpu")
    examples = load_examples([first], tokenizer=tokenizer, model=model)
    report = json.loads((output / "report.json").read_text())
    assert report["examples"] == len(examples) == sum(r["kept"] for r in results(first)) > 4
    assert report["training_set"] == training_set_hash(examples) and report["grader"] == "choice"
    assert sum(report["groups"].values()) == len(examples) and set(report["groups"]) == {"first/1", "first/2"}
    assert report["held_out"] == [f"first/{examples[i].id}" for i in report["fit"]["validation"]] != []
    assert report["model"] == "tiny" and report["paths"] == ["first"]
    assert "val. loss" in result.stdout and f"{len(examples)} examples from {first}" in result.stderr

    # By hand, from the same parts.
    routers = LayerRouters.for_model(
        model, router_size=8, windows=3, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in routers.state_dict().items()}
    pooled = pool_examples(model, [e.tokens for e in examples], [e.path for e in examples], windows=3, progress=False)
    config, groups = FitConfig(epochs=3, batch_size=4), [e.group for e in examples]
    fit(routers, pooled, targets_of(examples), groups=groups, config=config, progress=False)
    saved = LayerRouters.from_pretrained(output)
    assert same(saved.state_dict(), routers.state_dict()) and not same(before, saved.state_dict())
    assert saved.training_set == report["training_set"] and saved.grader == "choice"
    assert "choice" in (output / "README.md").read_text()
    drllm_fast.enable_dynamic_routing(model, str(output))
    model(torch.tensor([examples[0].tokens]))
    assert model.routing.plan.shape == (1, LAYERS)


def test_the_same_command_goes_on(found, tmp_path, monkeypatch):
    tiny, _, first, second = found
    whole = tmp_path / "whole"
    ended(train(tiny, [first, second], whole))
    assert json.loads((whole / "report.json").read_text())["paths"] == ["first", "second"]

    class Killed(Exception):
        pass

    calls, epoch = [0], fit_module._epoch

    def dies(*arguments):
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        return epoch(*arguments)

    parts = tmp_path / "parts"
    monkeypatch.setattr(fit_module, "_epoch", dies)
    assert isinstance(train(tiny, [first, second], parts).exception, Killed)
    assert not (parts / "config.json").exists()
    monkeypatch.setattr("drllm_fast.executor.RoutedForward.run_layer", None)  # the model is not run again
    ended(train(tiny, [first, second], parts))
    assert calls[0] == 4 and same(weights(parts), weights(whole))
    again = ended(train(tiny, [first, second], parts))
    assert calls[0] == 4 and same(weights(parts), weights(whole))
    rows = again.stdout.splitlines()
    assert len([line for line in rows if line.split()[:1] in (["1"], ["2"], ["3"])]) == 3


def test_options_reach_the_fit(found, tmp_path):
    tiny, _, first, _ = found
    more = (
        "--lr", 1e-5, "--weight-decay", 0.5, "--warmup", 2, "--gamma", 1, "--balance", "none", "--beta", 0.9,
        "--logit-adjustment", 0.5, "--robust", "cvar", "--cvar", 0.5, "--validation", 0.25, "--seed", 4,
    )  # fmt: skip
    ended(train(tiny, [first], tmp_path / "a", *more))
    config = json.loads((tmp_path / "a" / "report.json").read_text())["fit"]["config"]
    assert config == {
        "epochs": 3, "batch_size": 4, "learning_rate": 1e-5, "weight_decay": 0.5, "warmup_steps": 2,
        "schedule": "cosine", "gamma": 1.0, "balance": "none", "beta": 0.9, "logit_adjustment": 0.5, "robust": "cvar",
        "cvar": 0.5, "validation": 0.25, "seed": 4,
    }  # fmt: skip
    routers = LayerRouters.from_pretrained(tmp_path / "a")
    assert (routers.router_size, routers.windows) == (8, 3)
    fresh = LayerRouters.for_model(
        load_model(str(tiny), Dtype.auto, "cpu")[0], router_size=8, windows=3,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    assert (routers.w1 - fresh.w1).abs().max() < 1e-3  # it began there


def test_examples_are_chosen(found, tmp_path):
    tiny, _, first, _ = found

    def report(name, *more):
        ended(train(tiny, [first], tmp_path / name, *more))
        return json.loads((tmp_path / name / "report.json").read_text())

    best = report("best")
    assert report("all", "--all")["examples"] == COUNT > best["examples"]
    assert set(report("levels", "--levels", "2", "--balance", "none")["groups"]) == {"first/2"}
    assert report("limit", "--limit", 3, "--balance", "none")["examples"] == 3
    soft = report("soft", "--targets", "soft", "--windows-file", tmp_path / "best" / "training" / "windows.bin")
    assert soft["examples"] == best["examples"] and soft["training_set"] != best["training_set"]
    assert not (tmp_path / "soft" / "training" / "windows.bin").exists()
    cold = report("cold", "--targets", "soft", "--temperature", 0.01)
    assert not same(weights(tmp_path / "soft"), weights(tmp_path / "cold"))
    assert not same(weights(tmp_path / "soft"), weights(tmp_path / "best")) and cold["fit"]["class_counts"]


def test_windows_in_bfloat16(found, tmp_path):
    tiny, _, first, _ = found
    ended(train(tiny, [first], tmp_path / "wide"))
    ended(train(tiny, [first], tmp_path / "narrow", "--windows-dtype", "bfloat16"))
    wide, narrow = (tmp_path / name / "training" / "windows.bin" for name in ("wide", "narrow"))
    assert wide.stat().st_size == 2 * narrow.stat().st_size


# -- refusals
def test_another_training_is_refused(found, tmp_path):
    tiny, other, first, second = found
    output = tmp_path / "out"
    ended(train(tiny, [first], output))
    before = contents_of_all(output)
    for result, word in (
        (train(tiny, [first], output, "--seed", 1), "holds another fit: config.seed is 0, not 1"),
        (train(tiny, [first], output, "--epochs", 4), "config.epochs is 3, not 4"),
        (train(tiny, [second], output), "holds other windows"),
        (train(tiny, [first], output, "--windows", 2), "holds other windows: shape is"),
        (train(other, [first], output), "is not the model of the fingerprint"),
        (train(tiny, [first, first], output), "was searched in"),
    ):
        refused_at_last(result, word)
        assert contents_of_all(output) == before


def refused_at_last(result, *words):
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.output
    last = " ".join(result.stderr.split())
    for word in words:
        assert word in last, last


def contents_of_all(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--validation", 1], ["validation must be from 0 to below 1"]),
        (["--lr", 0], ["learning_rate must be a number above 0"]),
        (["--beta", 1], ["beta must be None, or from 0 to below 1"]),
        (["--cvar", 0], ["cvar must be above 0"]),
        (["--epochs", 0], ["--epochs"]),
        (["--targets", "worst"], ["--targets", "worst"]),
        (["--robust", "always"], ["--robust", "always"]),
        (["--tracker", "diary"], ["--tracker", "diary"]),
        (["--device", "cuda:99"], ["CUDA devices"]),
        (["--model", "./nowhere"], ["no such folder"]),
    ],
)
def test_bad_options_end_before_the_model_is_loaded(found, tmp_path, monkeypatch, more, words):
    tiny, _, first, _ = found
    monkeypatch.setattr(cli_train, "load_model", None)
    refused(train(tiny, [first], tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_bad_folders_end_before_the_model_is_loaded(found, tmp_path, monkeypatch):
    tiny, _, first, _ = found
    monkeypatch.setattr(cli_train, "load_model", None)
    refused(train(tiny, [first, tmp_path / "nothing"], tmp_path / "out"), "nothing is no output of a search")
    before = contents(first)
    refused(train(tiny, [first], first), "is not empty and no output of a training", "manifest.json")
    assert contents(first) == before
    (tmp_path / "file").write_text("mine")
    refused(train(tiny, [first], tmp_path / "file"), "is a file")
    refused(call("train", "--model", tiny, "--output", tmp_path / "out"), "--paths")
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_no_example_is_left(found, tmp_path):
    tiny, _, first, _ = found
    refused(train(tiny, [first], tmp_path / "out", "--levels", "9"), "no example", "levels [9]")
    assert not (tmp_path / "out").exists()


# -- interrupts
def test_ctrl_c_says_how_to_go_on(found, tmp_path, monkeypatch):
    tiny, _, first, _ = found

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    for name in ("drllm_fast.executor.RoutedForward.run_layer", "drllm_fast.training.fit._epoch"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupted)
            result = train(tiny, [first], tmp_path / "out")
        assert result.exit_code == 130 and f"kept in {tmp_path / 'out' / 'training'}, run the same" in result.stderr
    ended(train(tiny, [first], tmp_path / "out"))


def test_a_terminated_training_goes_on(found, tmp_path):
    tiny, _, first, _ = found
    output, epochs = tmp_path / "out", 30
    command = ("train", "--model", tiny, "--paths", first, "--output", output, *QUICK, "--epochs", epochs)
    process = start("-m", "drllm_fast.cli", *map(str, command))
    state, until = output / "training" / "fit.safetensors", time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command to go on" in err and "Traceback" not in err, err
    assert out == "" and state.exists() and not (output / "config.json").exists()
    ended(call(*command))
    ended(call("train", "--model", tiny, "--paths", first, "--output", tmp_path / "whole", *QUICK, "--epochs", epochs))
    assert same(weights(output), weights(tmp_path / "whole"))
