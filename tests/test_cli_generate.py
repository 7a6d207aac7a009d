"""`drllm-fast generate` on a tiny random Llama."""

import json
import signal

import pytest
from cli_cases import LAYERS, TEMPLATE, call, file_answers, file_command, interrupted_at, refused, start, tiny_folder

from drllm_fast import cli_generate
from drllm_fast.cli_models import SMOLLM2
from drllm_fast.cli_outputs import check_plot


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


def test_an_end_of_sequence_is_no_token_of_the_answer(tiny, tmp_path):
    """It is chosen and never read, so that the row holds its prompt and its answer."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "Hello"}))
    assert call(*file_command(tiny, source, target, policy="path:1,0,2,1")).exit_code == 0
    tokens = file_answers(target)[1]["tokens"]
    folder = tiny_folder(tmp_path / "ends")
    for end in (tokens[0], tokens[2]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        (row,) = as_json(generate(folder, "path:1,0,2,1", "--json", prompts=("Hello",)))["results"]
        assert row["tokens"] == 5 + tokens.index(end) and row["kv_bytes"] == row["tokens"] * LAYERS * 2 * 2 * 8 * 4
        assert call(*file_command(folder, source, target, "--overwrite", policy="path:1,0,2,1")).exit_code == 0
        ended = file_answers(target)[1]
        assert (ended["tokens"], ended["finish_reason"]) == (tokens[: tokens.index(end)], "stop")


def test_edits_are_a_path(tiny):
    edits, path = generate(tiny, "skip:1;repeat:2", "--json"), generate(tiny, "path:1,0,2,1", "--json")
    assert as_json(edits)["results"] == as_json(path)["results"]
    assert as_json(generate(tiny, "skip:0,2-3", "--json"))["results"][0]["path"] == [0, 1, 0, 0]


def test_dense_is_the_model_as_it_is(tiny):
    out = as_json(generate(tiny, "dense", "--json"))
    assert [r["answer"] for r in out["results"]] == reference(tiny, PROMPTS, [1] * LAYERS)
    assert [r["path"] for r in out["results"]] == [[1] * LAYERS] * 2
    assert out["totals"]["share"] == 1 and out["totals"]["kv_bytes"] == out["totals"]["kv_bytes_dense"]


def test_paths_differ_in_what_they_say(tiny):
    """Otherwise the comparisons above could not fail."""
    answers = [reference(tiny, PROMPTS, path) for path in ([1, 0, 2, 1], [1, 1, 1, 1], [0, 1, 0, 0])]
    assert len({tuple(a) for a in answers}) == 3


def test_prompts_from_a_file_in_batches(tiny, tmp_path):
    path = tmp_path / "prompts.txt"
    texts = ["one", "number two", "the\u2028third\x0c", "4", "fünf"]
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
    check_plot(tmp_path / "old.png")
    check_plot(tmp_path / "new.png")
    assert (tmp_path / "old.png").read_text() == "old" and not (tmp_path / "new.png").exists()


def test_the_chat_template_is_used_where_there_is_one(chatty):
    plain, chat = (as_json(generate(chatty, "skip:1", flag, "--json")) for flag in ("--no-chat", "--chat"))
    assert [r["tokens"] for r in plain["results"]] == [10, 20]
    assert [r["tokens"] for r in chat["results"]] == [10 + 6, 20 + 6]  # <u> and <a> are three bytes each
    assert as_json(generate(chatty, "skip:1", "--json"))["results"] == chat["results"]


def test_sampling_follows_its_seed(tiny):
    def file_answers(seed):
        out = as_json(generate(tiny, "skip:1", "--temperature", 2.0, "--seed", seed, "--json"))
        return [r["answer"] for r in out["results"]]

    assert file_answers(1) == file_answers(1) != file_answers(2)


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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(generate(tmp_path / "nothing", "skip:1"), "error: --model", "nothing: no such folder")
    refused(generate("./nothing", "skip:1"), "error: --model ./nothing: no such folder")
    words = "error: --model smollm3: no such folder, and not found on the Hub (", "bundled model is " + SMOLLM2
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
    refused(generate(tiny, tmp_path / "other"), "error:", "other")


def test_a_model_that_cannot_be_routed(tiny, tmp_path):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path)
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(
        tmp_path
    )
    refused(generate(tmp_path, "skip:1"), "Bloom", "cannot be routed")


def test_a_defect_keeps_its_traceback(tiny, monkeypatch):
    monkeypatch.setattr(cli_generate, "apply_policy", lambda *_: 1 / 0)
    assert isinstance(generate(tiny, "skip:1").exception, ZeroDivisionError)


def test_debug_shows_the_traceback_of_any_error(tiny, monkeypatch):
    monkeypatch.setenv("DRLLM_FAST_DEBUG", "1")
    assert isinstance(generate(tiny, "path:1,1").exception, ValueError)


def test_ctrl_c_in_the_middle(tiny):
    """A real process, a real signal, while it generates."""
    code = (
        "from drllm_fast import cli, cli_generate; run = cli_generate._run\n"
        "def wrapped(*a): print('begun', flush=True); return run(*a)\n"
        "cli_generate._run = wrapped; cli.main()"
    )
    prompts = [part for number in range(50) for part in ("--prompt", f"Prompt {number}")]
    options = ["--model", tiny, "--policy", "skip:1", "--batch-size", "1", "--max-new-tokens", "100000", *prompts]
    process = start("-c", code, "generate", *map(str, options))
    err = interrupted_at(process, "begun\n", signal.SIGINT, 1.0)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "interrupted" in err


def test_options_that_need_a_file(tiny):
    for more in (["--output", "x.jsonl"], ["--keep", "x"], ["--ordered"], ["--overwrite"]):
        refused(generate(tiny, "skip:1", *more), f"{more[0]} goes with --input FILE")
    refused(generate(tiny, "skip:1", "--input", __file__, prompts=()), "--input FILE needs --output FILE")
