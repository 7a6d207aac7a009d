"""What the routed model is compared with: Hugging Face's own model whose stack of layers is edited to a path."""

from __future__ import annotations

import copy

import torch
from torch import nn


def edited(model, path):
    """A deep copy of `model` whose ModuleList runs `path`: skipped layers left out, repeats as copies of their own."""
    model = copy.deepcopy(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    old, config = decoder.layers, decoder.config
    sources = [index for index, count in enumerate(path) for _ in range(count)]
    stack = []
    for position, source in enumerate(sources):
        layer = copy.deepcopy(old[source])
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
        stack.append(layer)
    decoder.layers = nn.ModuleList(stack)
    kinds = getattr(config, "layer_types", None)
    for cfg in {id(c): c for c in (config, model.config)}.values():
        cfg.num_hidden_layers = len(stack)
        if kinds is not None:
            cfg.layer_types = [kinds[source] for source in sources]
    return model


@torch.no_grad()
def greedy(model, ids, new_tokens, **kwargs):
    """Tokens [n] and scores [n, V] of cached greedy decoding of one unpadded prompt [S]."""
    out = model.generate(
        ids.unsqueeze(0),
        attention_mask=torch.ones_like(ids).unsqueeze(0),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **kwargs,
    )
    return out.sequences[0, len(ids) :], torch.stack(out.logits, 1)[0].float()


def padded(prompts, side="left", pad=0):
    """Prompts of different length as input_ids and attention_mask [B, S]."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}
