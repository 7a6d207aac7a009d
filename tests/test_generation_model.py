"""What the engine does to the model: nothing that stays, whatever ends it; and what is refused."""

import pytest
import torch
from families import LAYERS, tiny
from generation_cases import ROWS, Breaks, ByContent, Letters, routed

from drllm_fast.generation import Engine, Sampling, generate


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def state(model):
    """All that the engine could leave changed."""
    return (
        [(type(m), m.training, sorted(vars(m))) for m in model.modules()],
        {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())},
        [tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())],
        model.config._attn_implementation,
        getattr(model, "routing", None) and model.routing.policy,
    )


def assert_same(before, after):
    assert before[0] == after[0] and before[2:] == after[2:]
    assert before[1].keys() == after[1].keys() and all(torch.equal(before[1][n], after[1][n]) for n in before[1])


@pytest.mark.parametrize("way", ["end", "exception", "close", "dropped", "throw", "refused"])
@pytest.mark.parametrize("stream", [None, "ordered", "finished", "tokens"])
@pytest.mark.parametrize("on", [False, True])
def test_the_model_is_left_as_it_was(on, stream, way):
    if stream is None and way in ("close", "dropped", "throw"):
        return
    model = tiny("llama")
    model.train()
    model.model.layers[1].eval()
    if on:
        model.enable_dynamic_routing(Breaks(1, 2) if way == "exception" else ByContent())
    before = state(model)
    options = {"max_new_tokens": 4, "max_batch": 2, "lookahead": 0, "stream": stream}
    given = [*ROWS, [97]] if way == "refused" else ROWS  # 97 is no token
    if way in ("exception", "refused"):
        if way == "exception" and not on:
            given = iter([*ROWS[:3], "\u20ac"])  # refused when it is reached
        with pytest.raises((RuntimeError, ValueError)):
            list(generate(model, Letters(), given, **options))
    elif way == "end":
        assert list(generate(model, Letters(), given, **options))
    else:
        answers = iter(generate(model, Letters(), given, **options))
        next(answers)
        if way == "close":
            answers.close()
        elif way == "throw":
            with pytest.raises(KeyboardInterrupt):
                answers.throw(KeyboardInterrupt())
        del answers
    assert_same(before, state(model))
    model(torch.tensor([ROWS[0]]), use_cache=False).logits.sum().backward()  # and can be trained on


def test_nothing_of_the_last_batch_is_forgotten(llama):
    """`model.routing.stats` are those of the model's own forward."""
    with routed(llama, ByContent()), torch.no_grad():
        llama(torch.tensor([ROWS[2]]))
        plan = llama.routing.plan.tolist()
        generate(llama, Letters(), ROWS[:2], max_new_tokens=2)
        assert llama.routing.plan.tolist() == plan == [ByContent().path(ROWS[2])]


def submit(**options):
    return lambda model: with_engine(model, options)


def with_engine(model, options):
    with Engine(model, Letters(), **options.pop("engine", {})) as engine:
        try:
            engine.submit(options.pop("prompt", [5, 6]), options.pop("sampling", None), **options)
        finally:
            assert not engine.busy and engine.pool.used == 0


def call(prompts=((5, 6), (7,)), **options):
    return lambda model: generate(model, Letters(), [list(p) for p in prompts], **options)


@pytest.mark.parametrize(
    "do, error, said",
    [
        (submit(prompt=[]), ValueError, "no tokens"),
        (submit(prompt=""), ValueError, "no token of"),
        (submit(prompt=[97]), ValueError, "from 0 to 96"),
        (submit(prompt=[-1]), ValueError, "from 0 to 96"),
        (submit(prompt=[1.0]), TypeError, "integers"),
        (submit(prompt=[True]), TypeError, "integers"),
        (submit(prompt=b"ab"), TypeError, "bytes"),
        (submit(prompt=None), TypeError, "NoneType"),
        (submit(prompt={"role": "user"}), TypeError, "dict"),
        (submit(prompt=[{"role": "user"}]), ValueError, "role and a content"),
        (submit(prompt=[{"role": "user", "content": "x"}]), ValueError, "no chat template"),
        (submit(sampling={"max_new_tokens": 3}), TypeError, "Sampling"),
        (submit(path=[1, 1, 1]), ValueError, "4 layers"),
        (submit(path=[1, 1, 1, 3]), ValueError, "values from 1 to 3"),
        (submit(path=[[1, 1, 1, 1]]), ValueError, "path of one prompt"),
        (submit(path=[1.0, 1, 1, 1]), TypeError, "plan"),
        (submit(path=[1, 1, 1, 1], budget=0.5), ValueError, "not both"),
        (submit(budget=0.5), ValueError, "no budget"),
        (submit(sampling=Sampling(100), engine={"kv_tokens": 403}), ValueError, "404 places.*pool has 403"),
        (submit(engine={"max_batch": 0}), ValueError, "max_batch"),
        (submit(engine={"max_batch": 2.0}), TypeError, "max_batch"),
        (submit(engine={"lookahead": -1}), ValueError, "lookahead"),
        (submit(engine={"max_prompt_tokens": True}), TypeError, "max_prompt_tokens"),
        (submit(engine={"row_tokens": 0}), ValueError, "row_tokens"),
        (submit(engine={"kv_tokens": 0}), ValueError, "kv_tokens"),
        (submit(engine={"kv_tokens": 10.5}), TypeError, "kv_tokens"),
        (submit(engine={"batch": 3}), TypeError, "batch"),
        (call(stream="lines"), ValueError, "stream"),
        (call(sampling=[Sampling()]), ValueError, "1 sampling for 2 prompts"),
        (call(sampling=iter([Sampling()])), ValueError, "1 sampling for more prompts"),
        (call(paths=[[1] * LAYERS] * 3), ValueError, "3 paths for 2 prompts"),
        (call(paths=[1] * 2), ValueError, "plan"),
        (call(paths=3), TypeError, "paths"),
        (call(budgets="low"), TypeError, "budgets"),
        (call(budgets=[0.5, 0.5, 0.5]), ValueError, "3 budgets for 2 prompts"),
        (call(sampling=Sampling(), max_new_tokens=4), ValueError, "a part of sampling"),
        (call(max_new_tokens=0), ValueError, "max_new_tokens"),
        (call(prompts=[[5], [97]]), ValueError, "from 0 to 96"),
        (lambda model: generate(model, Letters(), "text"), TypeError, "prompts must be a list"),
        (lambda model: generate(torch.nn.Linear(2, 2), Letters(), ["text"]), TypeError, "PreTrainedModel"),
        (lambda model: Engine(model, Letters()).submit([5]), RuntimeError, "inside"),
        (lambda model: Engine(model, Letters()).step(), RuntimeError, "inside"),
    ],
)
def test_refusals_change_nothing(llama, do, error, said):
    before = state(llama)
    with pytest.raises(error, match=said):
        do(llama)
    assert_same(before, state(llama))


def test_a_plan_of_several_paths_does_not_say_whose_they_are(llama):
    with routed(llama, [[1, 1, 1, 1], [1, 0, 1, 1]]):
        with pytest.raises(ValueError, match="which prompt takes which"):
            generate(llama, Letters(), [[5], [6]])
        results = generate(llama, Letters(), [[5], [6]], max_new_tokens=1, paths=[[1, 1, 1, 1], [1, 0, 1, 1]])
        assert [result.visits for result in results] == [4, 3]


def test_an_engine_is_entered_once_at_a_time(llama):
    engine = Engine(llama, Letters())
    with engine, pytest.raises(RuntimeError, match="already"):
        engine.__enter__()
    with engine:
        request = engine.submit([5])
    assert request.finish_reason == "cancelled" and not engine.busy


@pytest.mark.parametrize("on", [False, True])
def test_streams_of_one_model_in_turn(on):
    """Each answers as alone; the first to end does not end the other's routing or evaluation mode."""
    model = tiny("llama")
    model.model.layers[1].train()
    if on:
        model.enable_dynamic_routing(ByContent())
    before = state(model)
    alone = [generate(model, Letters(), rows, max_new_tokens=new) for rows, new in ((ROWS[:1], 2), (ROWS, 6))]
    short, long = (
        generate(model, Letters(), rows, max_new_tokens=new, stream="finished")
        for rows, new in ((ROWS[:1], 2), (ROWS, 6))
    )
    first = next(long)
    assert [r.tokens for r in short] == [r.tokens for r in alone[0]]
    assert not any(m.training for m in model.modules())
    rest = sorted([first, *long], key=lambda r: r.index)
    assert [(r.path, r.tokens) for r in rest] == [(r.path, r.tokens) for r in alone[1]]
    assert_same(before, state(model))


@pytest.mark.parametrize("on", [False, True])
def test_routing_that_is_switched_under_an_engine_is_an_error(on):
    model = tiny("llama")
    if on:
        model.enable_dynamic_routing(ByContent())
    answers = generate(model, Letters(), ROWS, max_new_tokens=6, stream="tokens", max_batch=2, lookahead=0)
    next(answers)
    model.disable_dynamic_routing()
    again = generate(model, Letters(), ROWS, max_new_tokens=2)  # as long as the other is there
    assert [r.path for r in again] == [(1,) * LAYERS] * len(ROWS)
    with pytest.raises(RuntimeError, match="switched while prompts are answered"):
        list(answers)
    plain = state(tiny("llama"))
    assert state(model)[0] == plain[0] and state(model)[3:] == plain[3:]
    assert [len(r.tokens) for r in generate(model, Letters(), ROWS, max_new_tokens=2)] == [2] * len(ROWS)


def test_a_stream_takes_the_path_of_the_block_it_was_called_in(llama):
    with routed(llama, ByContent()):
        with llama.routing.using([0, 1, 1, 1]):
            inside = generate(llama, Letters(), ROWS, max_new_tokens=2, stream="ordered")
        outside = generate(llama, Letters(), iter(ROWS), max_new_tokens=2, stream="ordered")
        with llama.routing.disabled():
            assert {r.path for r in inside} == {(0, 1, 1, 1)}
            assert {r.path for r in outside} == {tuple(ByContent().path(row)) for row in ROWS}
