"""What the tests of the engine share: a tokenizer for the tiny models, policies, and answers by Hugging Face's own
generate on edited stacks."""

import contextlib

import torch
from characters import Characters
from families import LAYERS, prompts
from oracles import edited, greedy

from drllm_fast.budget import BudgetTable
from drllm_fast.generation import Engine
from drllm_fast.generation.kv_pool import KVPool
from drllm_fast.routers import LayerRouters

ROWS = [row.tolist() for row in prompts([7, 1, 20, 3, 12, 5, 33, 2, 9, 4], seed=5)]


class Letters(Characters):
    """`Characters` with what the engine asks of a tokenizer; token 1 is special."""

    def __init__(self, eos=None):
        self.eos_token_id = eos

    def __call__(self, text):
        return {"input_ids": self.encode(text)}

    def decode(self, tokens, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        return "".join(chr(token - 2 + 32) for token in tokens if token >= 2 or not skip_special_tokens)


class ByContent:
    """A layer path by the prompt's own tokens and the layer, asked block by block."""

    def __init__(self, budget=None):
        if budget is not None:
            self.budget = budget

    def path(self, tokens):
        return [self.decision(layer, tokens) for layer in range(LAYERS)]

    def decision(self, layer, tokens):
        wild = (sum(tokens) * 2654435761 + len(tokens) * 97 + layer * 40503) >> 7
        return (1, 0, 2, 1)[wild % 4] if getattr(self, "budget", 1.0) > 0.5 else wild % 2

    def route(self, layer, prompts):
        ends = prompts.cu_seqlens.tolist()
        rows = [prompts.input_ids[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]
        return torch.tensor([self.decision(layer, row) for row in rows])


def routers():
    """Layer routers whose decisions differ from prompt to prompt, and from budget to budget."""
    made = LayerRouters(
        num_layers=LAYERS, hidden_size=32, router_size=8, windows=3,
        calibration=BudgetTable((0.3, 1.0, 1.4), (2.0, 0.1, -0.8)), generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    with torch.no_grad():
        made.w2.mul_(30)
    return made


class Answers:
    """Greedy answers of `model`, prompt by prompt, by Hugging Face on the edited stack. `model` must not be routed."""

    def __init__(self, model):
        self.model, self.stacks, self.known = model, {}, {}

    def __call__(self, prompt, path, new):
        """Tokens [n] and their scores [n, V]."""
        key = (*prompt, None, *path)
        if key not in self.known or len(self.known[key][0]) < new:
            if tuple(path) not in self.stacks:
                self.stacks[tuple(path)] = edited(self.model, path)
            tokens, scores = greedy(self.stacks[tuple(path)], torch.tensor(prompt), new, use_cache=any(path))
            self.known[key] = tokens.tolist(), scores
        tokens, scores = self.known[key]
        return tokens[:new], scores[:new]


class Taken:
    """The deltas of an engine put together, and the results by index."""

    def __init__(self):
        self.results, self.texts, self.tokens = {}, {}, {}

    def take(self, deltas):
        for delta in deltas:
            index, result = delta.index, delta.result
            assert index not in self.results
            self.texts[index] = self.texts.get(index, "") + delta.text
            self.tokens.setdefault(index, []).extend(delta.tokens)
            if result is not None:
                assert (result.index, result.text, result.tokens) == (index, self.texts[index], self.tokens[index])
                self.results[index] = result


def finished(engine, taken=None):
    """Step until nothing is left; the results by index."""
    taken = taken or Taken()
    while engine.busy:
        check(engine)
        taken.take(engine.step())
    check(engine)
    assert engine.pool.used == 0
    return taken.results


def check(engine: Engine):
    """What holds between steps: limits are kept, and the rows' spans are what the pool has given away."""
    rows = [*engine.schedule.ready, *engine.schedule.running]
    assert len(engine.schedule.running) <= engine.schedule.max_batch
    assert len(rows) <= engine.schedule.max_batch + engine.schedule.lookahead
    spans = sorted((r.start, r.start + r.visits * r.capacity) for r in rows if r.visits)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert all(0 <= start and end <= engine.pool.size for start, end in spans)
    assert engine.pool.used == sum(end - start for start, end in spans)
    assert all(request.finish_reason is None for request in (*rows, *engine.schedule.waiting))


class Breaks(ByContent):
    """Fails at a block of the forward of that number."""

    def __init__(self, forward, layer):
        super().__init__()
        self.count, self.at = -1, (forward, layer)

    def route(self, layer, prompts):
        self.count += layer == 0
        if (self.count, layer) == self.at:
            raise RuntimeError("the policy broke")
        return super().route(layer, prompts)


class Watched(KVPool):
    """Notes which places hold keys of a row."""

    def __init__(self, size):
        super().__init__(size)
        self.live, self.most = set(), 0

    def write(self, index, keys, values):
        super().write(index, keys, values)
        assert all(0 <= place < self.size for place in index.tolist())
        self.live |= {*index.tolist()}
        self.most = max(self.most, len(self.live))

    def release(self, start, tokens):
        super().release(start, tokens)
        self.live -= set(range(start, start + tokens))


@contextlib.contextmanager
def routed(model, policy):
    model.enable_dynamic_routing(policy)
    try:
        yield model
    finally:
        model.disable_dynamic_routing()
