"""For tests of the command line: a tiny random model in a folder, tasks, and calls of the command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from typer.testing import CliRunner

from drllm_fast import cli
from drllm_fast.search.store import read_store

ROOT = Path(__file__).parent.parent
LAYERS = 4
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def byte_tokenizer(template=None):
    """A tokenizer of single bytes: 258 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<end>", "<pad>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def tiny_folder(folder, *, template=None, seed=0):
    """Fills the folder with a random Llama of LAYERS layers and a tokenizer of single bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(template)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=1,
        dtype=torch.float32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def refused(result, *words):
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert "Traceback" not in result.output and result.stdout == ""
    flat = " ".join(result.stderr.replace("│", " ").split())
    for word in words:
        assert word in flat, flat


def quiz(path, count=5, seed=0):
    """Fills a file with made-up questions of four choices and two levels."""
    rng = random.Random(seed)
    words = ["north", "no", "a tree", "six", "all of it", "why"]
    rows = [
        {"id": f"q{i}", "question": f"{rng.choice('What Who Why'.split())} is {i}?", "choices": rng.sample(words, 4),
         "answer": rng.randrange(4), "level": 1 + i % 2}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def free(path, count=3, **more):
    """Fills a file with made-up questions of free answers."""
    rows = [{"question": f"{i} and 1 make", "choices": None, "answer": str(i + 1), **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(*arguments):
    """Python with these arguments, as a process of its own."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background with interrupts ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def file_command(model, source, target, *more, policy="skip:1", new=6):
    """The arguments of `drllm-fast generate` for a file of prompts."""
    arguments = ["--model", model, "--policy", policy, "--max-new-tokens", new, "--input", source, "--output", target]
    return ["generate", *map(str, arguments), *map(str, more)]


def file_answers(path):
    """Of each line of the input its answer, but for the time it took."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert row.pop("seconds") > 0
    found = {row["line"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def interrupted_at(process, line, signal_number, seconds=0.0):
    """What a process says on stderr that is given the signal some time after the line came."""
    try:
        assert process.stdout.readline() == line, process.communicate()
        time.sleep(seconds)
        process.send_signal(signal_number)
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()


def ended(result):
    """The result of a call that went well."""
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def results(folder):
    """All that was stored, but for the time it took."""
    with read_store(folder) as store:
        assert store.duplicates == 0
        found = [asdict(result) for result in store.results()]
    for result in found:
        del result["seconds"]
    return found


def contents(folder):
    """Of each file, those of an open database aside."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".sqlite-wal", ".sqlite-shm")
    }


def without_cost(found):
    """Without `visits`: a forward that several prompts share is shared out among those that happen to be in it."""
    assert all(0 < result.pop("visits") <= result["visits_alone"] for result in found)
    return found
