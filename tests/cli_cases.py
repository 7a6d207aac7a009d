"""For tests of the command line: a tiny random model in a folder, and calls of the command in this process."""

import torch
from typer.testing import CliRunner

from drllm_fast import cli

LAYERS = 4
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def tiny_folder(folder, *, template=None, seed=0):
    """Fills the folder with a random Llama of LAYERS layers and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<end>", "<pad>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
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
