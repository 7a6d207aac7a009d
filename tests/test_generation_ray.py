"""Prompts of a Ray Dataset, answered by actors, against `drllm_fast.generate`."""

import os
import sys
from pathlib import Path

import pytest
from cli_cases import LAYERS, tiny_folder

import drllm_fast
from drllm_fast import Sampling

ray = pytest.importorskip("ray")
pytest.importorskip("pyarrow")

ROOT = Path(__file__).parent.parent
PATH = [1, 0, 2, 1]


@pytest.fixture(scope="module")
def cluster():
    # Other tests may have a Ray of their own in this process, of which the CPUs are not known.
    ray.shutdown()
    before = os.environ.get("PYTHONPATH")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    try:
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ |= {"PYTHONPATH": before} if before is not None else {}
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def rows():
    """Twelve, of which some have fields that others leave out."""
    return [
        {
            "number": i,
            "prompt": f"Prompt {i}",
            "max_new_tokens": 3 + i if i % 3 else None,
            "temperature": 1.0 if i % 2 else None,
            "seed": 100 + i,
            "path": None if i % 4 else [2, 1, 0, 1],
            "stop": ["x", "y"] if i == 5 else None,
        }
        for i in range(12)
    ]


def expected(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model.enable_dynamic_routing(PATH)
    given = rows()
    return drllm_fast.generate(
        model,
        tokenizer,
        [row["prompt"] for row in given],
        sampling=[
            Sampling(
                max_new_tokens=row["max_new_tokens"] or 5,
                temperature=row["temperature"] or 0.0,
                seed=row["seed"],
                stop=row["stop"] or (),
            )
            for row in given
        ],
        paths=[row["path"] or PATH for row in given],
    )


def test_two_actors_answer_as_one_call_does(cluster, folder, monkeypatch):
    from drllm_fast.generation.ray_data import generate_dataset

    monkeypatch.chdir(folder.parent)
    answers = generate_dataset(
        ray.data.from_items(rows(), override_num_blocks=4),
        model=folder.name,
        policy=PATH,
        sampling=Sampling(max_new_tokens=5),
        actors=2,
        num_cpus=1,
        batch_size=3,
        max_batch=2,
        prefix="answer_",
    )
    found = sorted(answers.take_all(), key=lambda row: row["number"])
    whole = expected(folder)
    assert [row["answer_tokens"] for row in found] == [answer.tokens for answer in whole]
    assert [row["answer_text"] for row in found] == [answer.text for answer in whole]
    assert [tuple(row["answer_path"]) for row in found] == [answer.path for answer in whole]
    assert [row["answer_visits"] for row in found] == [sum(row["answer_path"]) for row in found]
    assert [row["answer_finish_reason"] for row in found] == [answer.finish_reason for answer in whole]
    assert [row["answer_prompt_tokens"] for row in found] == [len(row["prompt"]) for row in rows()]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows()]
    assert all(row["answer_seconds"] > 0 for row in found)
    assert len({tuple(row["answer_path"]) for row in found}) == 2


def test_actors_that_take_all_cpus_are_warned_of(cluster, folder, caplog):
    from drllm_fast.generation.ray_data import generate_dataset

    ds = ray.data.from_items([{"prompt": "Hi"}])
    generate_dataset(ds, model=str(folder), actors=2)
    assert "leave none" not in caplog.text
    generate_dataset(ds, model=str(folder), actors=3)
    assert "leave none of the cluster's 3" in caplog.text


# -- the stage itself, without a cluster
@pytest.fixture(scope="module")
def stage(folder):
    from drllm_fast.generation.ray_data import GenerateStage

    return GenerateStage(str(folder), [0, 1, 1, 1], sampling=Sampling(max_new_tokens=4))


def table(*given):
    import pyarrow as pa

    return pa.Table.from_pylist(list(given))


def test_chats_and_token_ids(stage, folder):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("Hello")["input_ids"]
    plain = stage(table({"prompt": "Hello", "n": 1})).to_pylist()
    stage.prefix = "a_"
    try:
        as_ids = stage(table({"tokens": ids})).to_pylist()
        with pytest.raises(ValueError, match="no chat template"):
            stage(table({"messages": [{"role": "user", "content": "Hello"}]}))
    finally:
        stage.prefix = ""
    assert plain[0]["n"] == 1 and plain[0]["path"] == [0, 1, 1, 1] and len(plain[0]["tokens"]) == 4
    assert as_ids[0]["a_tokens"] == plain[0]["tokens"] and as_ids[0]["tokens"] == ids


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Hi", "text": "mine"}, "column 'text' already.*prefix"),
        ({"question": "Hi"}, "the row {'question': 'Hi'}: a row has one of"),
        ({"prompt": "Hi", "temperature": -1.0}, "the row .*: temperature must be"),
        ({"prompt": "Hi", "budget": 0.5}, "the row .*GivenPlan keeps no budget"),
    ],
)
def test_rows_that_are_refused(stage, row, words):
    with pytest.raises(ValueError, match=words):
        stage(table(row))


def test_what_is_wrong_with_the_arguments(folder):
    from drllm_fast.generation.ray_data import generate_dataset

    with pytest.raises(TypeError, match="from_items"):
        generate_dataset([{"prompt": "Hi"}], model=str(folder))
    with pytest.raises(TypeError, match="a function that makes one, got int"):
        generate_dataset(ray.data.from_items([{"prompt": "Hi"}]), model=3)
    for actors in (0, (2, 1)):
        with pytest.raises(ValueError, match="actors must be"):
            generate_dataset(ray.data.from_items([{"prompt": "Hi"}]), model=str(folder), actors=actors)


def test_a_model_that_a_function_makes(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drllm_fast.generation.ray_data import GenerateStage

    def load():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    (row,) = GenerateStage(load)(table({"prompt": "Hi", "max_new_tokens": 2})).to_pylist()
    assert row["path"] == [1] * LAYERS and len(row["tokens"]) == 2


def test_ray_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "drllm_fast.generation.ray_data", raising=False)
    with pytest.raises(ImportError, match=r'pip install "drllm-fast\[ray\]"'):
        __import__("drllm_fast.generation.ray_data")
