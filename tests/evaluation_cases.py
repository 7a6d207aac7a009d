"""Items, a tokenizer and a policy with a budget for the tests of evaluations, and what a path does by Hugging Face's
own edited model, one item at a time."""

import random

import torch
from characters import Characters
from oracles import edited, greedy

from drllm_fast import LayerRouters
from drllm_fast.search.unit import Item

WORDS = ["north", "no", "a tree", "six", "all of it", "why", "it was", "so"]


class Tokenizer(Characters):
    def __call__(self, text):  # for calibration, which reads any character
        return {"input_ids": [2 + ord(c) % 95 for c in text]}


TOKENIZER = Tokenizer()


class Thrifty:
    """Routers whose skips are the more likely the smaller the budget; the wider `scale`, the more paths differ."""

    def __init__(self, model, scale=40.0):
        self.routers = LayerRouters.for_model(model, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            self.routers.w2 *= scale
        self.budget = 1.0

    def bind(self, model):
        self.routers.bind(model)

    def route(self, layer, prompts):
        logits = self.routers.logits(layer, prompts).detach()
        logits[:, 0] += 40 * (1 - self.budget) - 8
        return logits.argmax(-1).to(torch.int8)


def choices(count=9, seed=0, task="quiz"):
    rng = random.Random(seed)
    return [
        Item(
            f"q{i}", task, f"{rng.choice('What Who Why'.split())} is {'so ' * rng.randrange(4)}{i}?",
            tuple(f" {word}" for word in rng.sample(WORDS, 3)), rng.randrange(3),
        )
        for i in range(count)
    ]  # fmt: skip


def free(model, count=4):
    """Half of them have the dense model's answer for the right one, half another path's."""
    items = []
    for i in range(count):
        path = (1, 1, 1, 1) if i % 2 else (1, 0, 1, 1)
        prompt = f"{i} and {i + 1} make"
        answer = TOKENIZER.decode(greedy(edited(model, path), torch.tensor(TOKENIZER.encode(prompt)), 3)[0].tolist())
        items.append(Item(f"f{i}", "sums", prompt, None, answer, max_new_tokens=3))
    return items


def texts(count=5, seed=0):
    rng = random.Random(seed)
    return [
        Item(f"t{i}", "text", f"{i} " * (i > 0) + rng.choice(WORDS), (" " + " ".join(rng.sample(WORDS, 1 + i)),), 0)
        for i in range(count)
    ]


@torch.no_grad()
def scores(model, item, path):
    """Log-likelihood of each choice."""
    alone, before = edited(model, path), TOKENIZER.encode(item.prompt)
    found = []
    for choice in item.choices:
        ids = torch.tensor([before + TOKENIZER.encode(choice)])
        logp = alone(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].log_softmax(-1)
        found.append(float(logp.gather(1, ids[0, len(before) :, None]).sum()))
    return found


def written(model, item, path):
    tokens = torch.tensor(TOKENIZER.encode(item.prompt))
    return TOKENIZER.decode(greedy(edited(model, path), tokens, item.max_new_tokens)[0].tolist())
