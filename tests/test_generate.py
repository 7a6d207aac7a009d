"""The rest of `generate`: sampling, beams, drafts, streams, second turns, embeddings, hidden states, precisions."""

import copy

import pytest
import torch
from families import LAYERS, prompts, tiny
from oracles import edited, greedy, padded
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import drllm_fast  # noqa: F401

PATH = [1, 2, 0, 1]
PATHS = [[0, 1, 1, 1], [1, 2, 0, 1], [2, 0, 2, 2]]
TOLERANCE = {"atol": 2e-3, "rtol": 0}


class ByLength:
    """Routes layerwise on what it sees: short prompts skip block 1, long ones repeat block 2. Notes what it saw."""

    def __init__(self):
        self.seen = []

    def route(self, layer, prompts):
        lengths = prompts.cu_seqlens.diff()
        assert prompts.hidden.shape[0] == lengths.sum()
        self.seen.append((layer, lengths.tolist(), None if prompts.input_ids is None else prompts.input_ids.tolist()))
        decisions = torch.ones(len(lengths), dtype=torch.int64)
        if layer == 1:
            decisions[lengths < 8] = 0
        if layer == 2:
            decisions[lengths >= 8] = 2
        return decisions


def test_sampling_with_a_seed(model, row):
    def sample(m):
        torch.manual_seed(5)
        return m.generate(row[None], do_sample=True, top_k=20, temperature=1.3, max_new_tokens=12, pad_token_id=0)

    expected = sample(edited(model, PATH))
    assert torch.equal(sample(model.enable_dynamic_routing(PATH)), expected)
    assert not torch.equal(sample(model.disable_dynamic_routing()), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_beams_with_several_return_sequences(family):
    model, rows = tiny(family), prompts([5, 12, 8])
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    expected = [edited(model, p).generate(r[None], **options)[:, len(r) :] for p, r in zip(PATHS, rows, strict=True)]
    model.enable_dynamic_routing(PATHS)
    batch = padded(rows)
    out = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(out, torch.cat(expected))
    assert model.routing.plan.shape == (12, LAYERS)


def test_return_sequences_without_beams(model, row):
    model.enable_dynamic_routing(ByLength())
    out = model.generate(row[None], do_sample=True, num_return_sequences=3, max_new_tokens=4, pad_token_id=0)
    assert out.shape[0] == 3
    assert model.routing.plan.tolist() == [[1, 1, 2, 1]] * 3


@pytest.mark.parametrize("draft", ["dense", "routed", "lookup"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_decoding(family, draft):
    model, assistant = tiny(family), tiny(family, seed=3)
    row = torch.tensor([5, 6, 7, 8, 9, 5, 6, 7, 8])
    tokens, _ = greedy(edited(model, [1, 1, 2, 1]), row, 12)
    policy = ByLength()
    model.enable_dynamic_routing(policy)
    if draft == "routed":
        assistant.enable_dynamic_routing([1, 0, 1, 1])
    options = {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": assistant}
    out = model.generate(row[None], do_sample=False, max_new_tokens=12, pad_token_id=0, **options)
    assert out[0, len(row) :].tolist() == tokens.tolist()
    # The path was chosen from the prompt alone, though draft tokens were in the same forward.
    assert [seen[1:] for seen in policy.seen] == [([9], row.tolist())] * LAYERS


def test_early_exit_draft(model, row):
    expected, _ = greedy(edited(model, PATH), row, 8)
    model.enable_dynamic_routing(PATH)
    out = model.generate(row[None], do_sample=False, max_new_tokens=8, pad_token_id=0, assistant_early_exit=2)
    assert out[0, len(row) :].tolist() == expected.tolist()


def test_without_a_cache(model):
    rows = prompts([4, 11])
    expected = [greedy(edited(model, p), r, 5)[0] for p, r in zip([[1, 0, 1, 1], [1, 1, 2, 1]], rows, strict=True)]
    policy = ByLength()
    model.enable_dynamic_routing(policy)
    batch = padded(rows)
    out = model.generate(**batch, do_sample=False, max_new_tokens=5, use_cache=False)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == [e.tolist() for e in expected]
    assert {tuple(seen[1]) for seen in policy.seen} == {(4, 11)}  # at every step, the prompt and nothing else


def test_streaming(model, row):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.reshape(-1).tolist()

        def end(self):
            self.ended = True

    expected, _ = greedy(edited(model, PATH), row, 6)
    model.enable_dynamic_routing(PATH)
    streamer = Collector()
    model.generate(row[None], do_sample=False, max_new_tokens=6, streamer=streamer, pad_token_id=0)
    assert streamer.ended and streamer.tokens == row.tolist() + expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("given", [False, True])
def test_a_second_turn_on_the_cache(family, given):
    """Two turns of a padded batch equal one long prompt per row; the path stays the first turn's."""
    model = tiny(family)
    first, second = prompts([3, 12]), prompts([4, 4], seed=9)
    policy = ByLength()
    paths = [[1, 0, 1, 1], [1, 1, 2, 1]]
    stacks = [edited(model, p) for p in paths]
    model.enable_dynamic_routing(policy)
    batch = padded(first)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}
    cache = DynamicCache(config=model.config) if given else None
    turn = model.generate(**batch, **options, past_key_values=cache)
    if given:
        assert turn.past_key_values is cache  # who holds the cache keeps it
    ids = torch.cat([turn.sequences, torch.stack(second)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 5 + 4, dtype=torch.long)], 1)
    again = model.generate(ids, attention_mask=mask, past_key_values=turn.past_key_values, **options)
    for r in range(2):
        talk = torch.cat([first[r], turn.sequences[r, 12:], second[r]])
        assert again.sequences[r, ids.shape[1] :].tolist() == greedy(stacks[r], talk, 5)[0].tolist()
    assert len(policy.seen) == LAYERS
    assert model.routing.plan.tolist() == paths


def test_a_cached_prefix_is_copied_for_several_questions(model):
    """Hugging Face's prompt-caching recipe: prefill once, deep-copy the cache for every question."""
    prefix, questions = prompts([10])[0], prompts([3, 6, 2], seed=4)
    stack = edited(model, [1, 1, 2, 1])
    model.enable_dynamic_routing(ByLength())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        cache = model(prefix[None], past_key_values=cache).past_key_values
    for question in questions:
        ids = torch.cat([prefix, question])[None]
        out = model.generate(
            ids, past_key_values=copy.deepcopy(cache), do_sample=False, max_new_tokens=4, pad_token_id=0
        )
        assert out[0, ids.shape[1] :].tolist() == greedy(stack, ids[0], 4)[0].tolist()
    assert cache.get_seq_length() == len(prefix)


def test_inputs_embeds(model):
    rows = prompts([6, 9])
    expected = [greedy(edited(model, p), r, 4)[0].tolist() for p, r in zip(PATHS[:2], rows, strict=True)]
    batch = padded(rows)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    model.enable_dynamic_routing(PATHS[:2])
    out = model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=4
    )
    assert out.tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_come_unpacked_and_in_full_length(model, side):
    rows = prompts([6, 9, 2])
    stacks = [edited(model, p) for p in PATHS]
    model.enable_dynamic_routing(PATHS)
    batch = padded(rows, side)
    out = model(**batch, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for r, (row, stack, path) in enumerate(zip(rows, stacks, PATHS, strict=True)):
        real = batch["attention_mask"][r].bool()
        reference = stack(row[None], output_hidden_states=True).hidden_states
        visits = torch.tensor(path).cumsum(0).tolist()  # how deep in the edited stack each block ends
        assert all(h.shape == (3, 9, 32) for h in out.hidden_states)
        for layer in range(LAYERS - 1):
            torch.testing.assert_close(out.hidden_states[layer + 1][r, real], reference[visits[layer]][0], **TOLERANCE)
        torch.testing.assert_close(out.hidden_states[-1][r, real], reference[-1][0], **TOLERANCE)


def test_hidden_states_of_generate(model, row):
    model.enable_dynamic_routing(PATH)
    out = model.generate(row[None], max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert [h[0].shape for h in out.hidden_states] == [(1, 9, 32), (1, 1, 32), (1, 1, 32)]


@torch.no_grad()
def test_logits_to_keep(model):
    rows = prompts([5, 9])
    batch = padded(rows)
    model.enable_dynamic_routing(PATHS[:2])
    full = model(**batch).logits
    assert torch.equal(model(**batch, logits_to_keep=2).logits, full[:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_fp32_as_the_edited_stack(dtype):
    model, rows = tiny("llama"), prompts([7, 13, 4])
    exact = [edited(model, p)(r[None]).logits[0] for p, r in zip(PATHS, rows, strict=True)]
    low = model.to(dtype)
    eager = [edited(low, p)(r[None]).logits[0].float() for p, r in zip(PATHS, rows, strict=True)]
    low.enable_dynamic_routing(PATHS)
    batch = padded(rows)
    out = low(**batch).logits.float()
    for r in range(3):
        ours = (out[r, batch["attention_mask"][r].bool()] - exact[r]).abs().max()
        assert ours <= 2 * (eager[r] - exact[r]).abs().max()


def test_training_through_a_routed_model(model):
    """Loss and gradients of a padded batch equal those of the edited stack; a repeat's gradient counts both passes."""
    row = prompts([8])[0]
    stack = edited(model, [1, 1, 0, 1])
    stack.train()
    stack(row[None], labels=row[None], use_cache=False).loss.backward()
    model.enable_dynamic_routing([1, 1, 0, 1])
    model.train()
    batch = padded([row, prompts([3])[0]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1] = -100
    loss = model(**batch, labels=labels).loss  # use_cache is left on, as people do
    loss.backward()
    theirs = dict(stack.named_parameters())
    names = {0: 0, 1: 1, 3: 2}
    for name, parameter in model.named_parameters():
        if ".layers.2." in name:
            assert parameter.grad is None
            continue
        for ours, other in names.items():
            if f".layers.{ours}." in name:
                name = name.replace(f".layers.{ours}.", f".layers.{other}.")
                break
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-3)


def test_gradients_flow_through_cached_steps(model, row):
    model.enable_dynamic_routing([1, 2, 1, 1])
    whole = model(row[None], use_cache=False).logits[0, -1].square().sum()
    expected = torch.autograd.grad(whole, model.get_input_embeddings().weight)[0]
    out = model(row[None, :6])
    for token in row[6:]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values)
    actual = torch.autograd.grad(out.logits[0, -1].square().sum(), model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_prefill_under_inference_mode_goes_on_under_no_grad(model, row):
    expected, _ = greedy(edited(model, PATH), row, 2)
    model.enable_dynamic_routing(PATH)
    with torch.inference_mode():
        out = model(row[None])
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
    with torch.no_grad():
        model(torch.tensor([[3]]), past_key_values=out.past_key_values)
    assert out.logits[0, -1].argmax() == expected[1]


def test_every_block_skipped(model, row):
    """With no block run, the model is the embedding, the final norm and the head, at decode as well."""
    model.enable_dynamic_routing([0] * LAYERS)
    tokens, scores = greedy(model, row, 3)
    base = model.model
    last = torch.cat([row[-1:], tokens[:-1]])
    with torch.no_grad():
        reference = model.lm_head(base.norm(base.embed_tokens(last)))
    torch.testing.assert_close(scores, reference, **TOLERANCE)
    assert model.routing.stats.visits_run == 0 and model.routing.stats.kv_bytes == 0
