"""Tasks: prompts equal lm-eval's, data of every kind becomes the same items, and bad data is named with its place."""

import gzip
import json
from pathlib import Path

import pytest

from drllm_fast.search.layouts import by_fields, find_layout
from drllm_fast.search.prompts import FORMS, form_of, grader_of
from drllm_fast.search.rows import check_row
from drllm_fast.search.tasks import load_rows, load_task, parse_levels

# One or two rows of each data set's columns, made up; and lm-eval's file for them.
ARC = {"id": "q1", "question": "What is ice?", "answerKey": "2"}
HUB: dict[str, tuple[str, list[dict]]] = {
    "arc_easy": (
        "arc/arc_easy.yaml",
        [
            ARC | {"choices": {"text": ["gas", "water", "rock"], "label": ["1", "2", "3"]}},
            ARC | {"id": "q2", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        ],
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        [{"id": "7", "question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}}],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        [{"goal": "How to cool tea?", "sol1": "Add ice ", "sol2": "add  fire", "label": 0}],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        [
            {
                "ind": 4,
                "activity_label": "Making tea",
                "ctx_a": "[header] How to make tea [title] Boil water. [step] Pour   it.",
                "ctx_b": "the Woman",
                "endings": ["drinks  it. [substeps] Slowly.", " sings.", "sits."],
                "label": "1",
            }
        ],
    ),
    "copa": (
        "super_glue/copa/default.yaml",
        [
            {"premise": "It rained. ", "choice1": "The road got wet.", "choice2": "I sang.", "question": "effect"},
            {"premise": "He fell.", "choice1": "He ran.", "choice2": "Ice lay there.", "question": "cause"},
        ],
    ),
    "blimp": (
        "blimp/adjunct_island.yaml",
        [{"sentence_good": "Who sang?", "sentence_bad": "Who sang him?", "UID": "adjunct_island", "pair_id": 0}],
    ),
    "mmlu": (
        "mmlu/default/mmlu_abstract_algebra.yaml",
        [
            {"question": f" What is {n} + {n}? ", "subject": "abstract_algebra", "choices": list("2468"), "answer": n}
            for n in range(4)
        ],
    ),
    "gsm8k": (
        "gsm8k/gsm8k.yaml",
        [
            {"question": f"Ann has {n} cats and gets 1. How many?", "answer": f"{n} + 1 = {n + 1}.\n#### 1,00{n}"}
            for n in range(3)
        ],
    ),
    "siqa": (
        "siqa/siqa.yaml",
        [{"context": "Jo fell.", "question": "What now?", "answerA": "up", "answerB": "on", "answerC": "in"}],
    ),
    "commonsense_qa": (
        "commonsense_qa/default.yaml",
        [
            {
                "id": "c",
                "question": "Where is ice? ",
                "question_concept": "ice",
                "choices": {"label": list("ABCDE"), "text": ["sun", "oven", "lake", "fire", "bed"]},
                "answerKey": "C",
            }
        ],
    ),
    "truthfulqa_mc1": (
        "truthfulqa/truthfulqa_mc1.yaml",
        [{"question": "Is ice hot?", "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]}}],
    ),
}
HUB["openbookqa"][1][0]["answerKey"] = "B"
HUB["copa"][1][0]["label"], HUB["copa"][1][1]["label"] = 0, 1
HUB["siqa"][1][0]["label"] = "3"


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    # The library read its environment when it was imported.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def harness_task(name: str, rows: list[dict], folder: Path):
    """lm-eval's own task, with made-up rows for its data."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / name)
    for key in ("tag", "dataset_name", "training_split", "validation_split", "test_split"):
        config.pop(key, None)
    file = str(write(folder / "rows.jsonl", rows))
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}, "test_split": "test"}
    config |= {"dataset_kwargs": config["dataset_kwargs"] | {"cache_dir": str(folder / "cache")}}
    if "fewshot_split" in config:
        config["fewshot_split"] = "test"
    return ConfigurableTask(config=config)


@pytest.mark.parametrize("task", HUB)
def test_prompts_and_choices_are_those_of_lm_eval(task, tmp_path, offline):
    file, rows = HUB[task]
    harness = harness_task(file, rows, tmp_path / "harness")
    write(tmp_path / "data" / "train.jsonl", rows)
    items = load_task(f"hf:{tmp_path / 'data'}", shots=0)
    documents = list(harness.test_docs())
    assert len(items) == len(documents) == len(rows)
    for item, document in zip(items, documents, strict=True):
        requests = harness.construct_requests(document, harness.fewshot_context(document, 0), metadata=(task, 0, 1))
        if item.choices is None:
            assert item.prompt == requests.args[0]
            assert list(item.stop) == requests.args[1]["until"]
        else:
            assert [(item.prompt, choice) for choice in item.choices] == [request.args for request in requests]
            right = harness.doc_to_target(document)
            texts = harness.doc_to_choice(document)
            assert right in (item.answer, texts[item.answer])
        assert item.task == task


@pytest.mark.parametrize("task", ["arc_easy", "mmlu", "gsm8k", "copa"])
def test_solved_examples_are_written_as_lm_eval_writes_them(task, tmp_path, offline):
    file, rows = HUB[task]
    harness = harness_task(file, rows, tmp_path / "harness")
    write(tmp_path / "data" / "train.jsonl", rows)
    first, last = load_task(f"hf:{tmp_path / 'data'}", shots=1)[:: len(rows) - 1]
    documents = list(harness.test_docs())
    shown = next(i for i, row in enumerate(load_task(f"hf:{tmp_path / 'data'}", shots=0)) if row.prompt in last.prompt)
    harness.sampler.sample = lambda n, **_: [documents[shown]]
    assert last.prompt == harness.fewshot_context(documents[-1], 1)
    assert first.prompt != last.prompt


def test_layouts_of_other_known_columns():
    def converted(row, name=""):
        layout = find_layout(list(row), name)
        return layout.task, check_row({"id": 0, "task": layout.task, **layout.convert(row)}, "here")

    row = {"problem": "1 + 1?", "level": "Level 5", "type": "Algebra", "solution": "So \\boxed{\\frac{2}{1}}."}
    task, row = converted(row)
    assert (task, row["answer"], row["level"], row["subject"]) == ("math", "\\frac{2}{1}", 5, "Algebra")
    assert converted({"problem": "?", "level": "Level ?", "solution": "\\boxed 7 ."})[1]["level"] is None
    assert converted({"problem": "?", "level": 3, "solution": "\\boxed 7 ."})[1]["answer"] == "7"
    task, row = converted({"Body": "Two. ", "Question": "How many?", "Answer": 145.0, "Type": "Addition"})
    assert (task, row["question"], row["answer"]) == ("svamp", "Two. How many?", "145")
    task, row = converted({"sentence": "Ann beat Eve as _ trained.", "option1": "Ann", "option2": "Eve", "answer": "2"})
    assert (task, row["answer"]) == ("winogrande", 1)
    row = {"id": "s", "title": "T", "context": "C.", "question": "Q?", "answers": {"text": ["a", "b", "a"]}}
    assert converted(row)[1]["aliases"] == ["b"]
    assert converted(row | {"answers": {"text": []}})[1]["answer"] == ""
    assert converted({"text": "one two three"}, "EleutherAI/lambada_openai:default")[0] == "lambada_openai"
    assert find_layout(["text"], "wikitext") is None
    arc = HUB["arc_easy"][1][0]
    assert find_layout(list(arc), "allenai/ai2_arc:ARC-Challenge").task == "arc_challenge"


def test_forms_that_are_not_lm_evals(tmp_path):
    rows = [
        {"task": "winogrande", "question": "Ann beat Eve as _ trained.", "choices": ["Ann", "Eve"], "answer": 0},
        {"task": "math", "question": "1 + 1?", "answer": "2", "level": 1},
        {"task": "squad_v2", "question": "C.\n\nQuestion: Q?", "answer": "", "aliases": []},
        {"task": "agieval_sat_en", "question": "Why?", "choices": ["x", "y"], "answer": 1},
        {"task": "copa", "question": "It rained, therefore", "choices": ["it was wet.", "It was dry."], "answer": 0},
        {"question": "Own?", "choices": ["a", "b"], "answer": 1},
        {"question": "Own number?", "answer": 7, "form": "verbatim"},
    ]
    path = write(tmp_path / "mixed.jsonl", rows)
    winogrande, math, squad, agieval, copa, own, number = load_task(str(path))
    assert (winogrande.prompt, winogrande.choices) == ("Ann beat Eve as", (" Ann trained.", " Eve trained."))
    assert "\\boxed{}" in math.prompt and math.level == 1 and math.max_new_tokens == 512
    assert squad.answer == "unanswerable" and squad.prompt == "Background: C.\n\nQuestion: Q?\n\nAnswer:"
    assert agieval.prompt == "Q: Why? Answer Choices: (A)x (B)y\nA: Among A through B, the answer is"
    assert agieval.choices == (" (A)x", " (B)y")
    assert (copa.prompt, copa.choices) == ("It rained therefore", ("  it was wet.", "  it was dry."))
    assert (own.task, own.prompt, own.choices) == ("mixed", "Question: Own?\nAnswer:", (" a", " b"))
    assert (number.prompt, number.answer, number.id) == ("Own number?", "7", "6")
    assert load_task(str(path), limit=1, form="letters", drop_unanswered=True)[0].choices == (" A", " B")
    assert load_task(str(path), limit=2, max_new_tokens=3)[1].max_new_tokens == 3
    other = str(write(tmp_path / "other.jsonl", rows[6:]))
    assert "\\boxed{7}" in load_task(str(path), levels=[1], shots=1, examples=other)[0].prompt
    with pytest.raises(ValueError, match="row 1 of math has 0 others"):
        load_task(str(path), levels=[1], shots=1)


def test_graders_that_suit_the_tasks():
    found = {task: grader_of(task) for task in ("gsm8k", "math", "synth_arith", "lambada_openai", "squad_v2", "own")}
    assert list(found.values()) == ["math-verify", "math-verify", "exact", "first-word", "exact", "exact"]


def test_every_form_asks_and_unknown_ones_are_named():
    for name, form in FORMS.items():
        row = {"id": "i", "task": name, "question": "A _ b, because", "choices": ["x", "y"], "answer": 0}
        assert form.text(row) is not None and len(form.choices(row)) == 2, name
    with pytest.raises(
        ValueError, match=r"no prompt form for the task 'arc_esay'; known are .*arc_easy.*form='question'"
    ):
        form_of("arc_esay")


def test_examples_are_drawn_by_seed_and_never_the_item(tmp_path):
    rows = [{"id": f"r{n}", "task": "svamp", "question": f"What is {n}?", "answer": str(n)} for n in range(6)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    prompts = [item.prompt for item in load_task(path, shots=5)]
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.count(row["question"]) == 1 and prompt.endswith(f"{row['question']}\nAnswer:")
        assert prompt.count("Question:") == 6 and prompt.count("\n\n") == 5
    assert [item.prompt for item in load_task(path, shots=5)] == prompts
    assert [item.prompt for item in load_task(path, shots=5, limit=2)] == prompts[:2]
    assert [item.prompt for item in load_task(path, shots=5, seed=1)] != prompts
    with pytest.raises(ValueError, match="6 solved examples were asked for, and row r0 of svamp has 5 others; ask for"):
        load_task(path, shots=6)
    again = str(write(tmp_path / "again.jsonl", rows + [row | {"id": row["id"] + "b"} for row in rows]))
    assert [item.prompt for item in load_task(again, shots=5)] == prompts * 2
    others = [row | {"id": "o", "question": "Other?", "answer": "9"} for row in rows[:1]]
    other = str(write(tmp_path / "other.jsonl", others))
    assert load_task(path, shots=1, examples=other)[0].prompt.startswith(
        "Question: Other?\nAnswer: 9\n\nQuestion: What"
    )


def test_mmlus_examples_are_of_the_subject_and_the_first(tmp_path):
    def row(subject, n):
        return {
            "id": f"{subject}/{n}",
            "task": "mmlu",
            "question": f"{subject} {n}?",
            "choices": list("wxyz"),
            "answer": n,
        }

    rows = [row(subject, n) | {"subject": subject} for n in range(4) for subject in ("high_school", "law")]
    items = load_task(str(write(tmp_path / "rows.jsonl", rows)), shots=2)
    assert items[1].prompt.startswith(
        "The following are multiple choice questions (with answers) about law.\n\nlaw 1?\nA. w\n"
    )
    assert [line for line in items[7].prompt.splitlines() if "?" in line] == ["law 0?", "law 1?", "law 3?"]
    assert items[0].prompt.startswith(
        "The following are multiple choice questions (with answers) about high school.\n\n"
    )
    with pytest.raises(ValueError, match="with its subject 'high_school'"):
        load_task(str(tmp_path / "rows.jsonl"), shots=4)


def test_generated_arithmetic():
    items = load_task("synth_arith:1,4", limit=6)
    assert [item.level for item in items] == [1, 4] * 3
    lines = items[1].prompt.split("\n")
    assert len(lines) == 4 and all("*" in line for line in lines) and lines[-1].endswith(" =")
    for line in lines[:-1]:
        question, answer = line.split(" = ")
        assert eval(question) == int(answer)
    assert load_task("synth_arith", levels="1,4")[0] == items[0]
    assert load_task("synth_arith:2", limit=9, seed=1) != load_task("synth_arith:2", limit=9)
    with pytest.raises(ValueError, match=r"levels 'easy'; write them as 2, 1-3 or 1,4"):
        load_task("synth_arith:easy")
    with pytest.raises(ValueError, match="unknown level 6"):
        load_task("synth_arith:5-6")
    assert parse_levels("1-2,5") == [1, 2, 5]


def test_a_data_sets_splits_columns_and_refusals(tmp_path, offline):
    rows = [
        {"stem": "2 + 2?", "a": "3", "b": "4", "key": "B", "n": 1},
        {"stem": "3?", "a": "3", "b": "4", "key": "3", "n": 2},
    ]
    write(tmp_path / "set" / "test.jsonl", rows)
    write(tmp_path / "set" / "validation.jsonl", rows[:1])
    fields = {"question": "stem", "choices": ["a", "b"], "answer": "key", "level": "n"}
    items = load_task(f"hf:{tmp_path}/set:test", fields=fields)
    assert [(item.answer, item.choices, item.level) for item in items] == [(1, (" 3", " 4"), 1), (0, (" 3", " 4"), 2)]
    assert items[0].id == "test/0" and items[0].prompt == "Question: 2 + 2?\nAnswer:"
    assert [item.id for item in load_task(f"hf:{tmp_path}/set", fields=fields)] == ["validation/0"]
    assert len(load_task(f"hf:{tmp_path}/set:default:test", fields=fields)) == 2
    assert len(load_task(f"hf:{tmp_path}/set::test", fields=fields, levels=[2])) == 1
    with pytest.raises(
        ValueError, match=r"the columns .*stem.* are of no known layout \(known: arc_easy, .*name them with"
    ):
        load_task(f"hf:{tmp_path}/set")
    with pytest.raises(ValueError, match=r"validation row 0: no column 'stam'; it has .*stem"):
        load_task(f"hf:{tmp_path}/set", fields=fields | {"question": "stam"})
    with pytest.raises(ValueError, match="the answer '2 . 2.' is no index, label, letter or text"):
        load_task(f"hf:{tmp_path}/set", fields=fields | {"answer": "stem"})
    with pytest.raises(OSError, match="cannot load hf:.*nowhere"):
        load_task(f"hf:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match=r"is not hf:DATASET"):
        load_task("hf:a:b:c:d")
    piqa = HUB["piqa"][1][0] | {"label": -1}
    write(tmp_path / "piqa" / "test.jsonl", [piqa])
    with pytest.raises(
        ValueError, match="test row 0: cannot be read as piqa: it has no answer; take a split with answers"
    ):
        load_task(f"hf:{tmp_path}/piqa")


def test_fields():
    convert = by_fields({"question": "q", "choices": "options.text", "labels": "options.name", "answer": "gold"})
    row = {"id": 5, "q": "?", "options": {"text": ["1", "0"], "name": ["0", "y"]}}
    # A label goes before a text, a text before an index.
    for gold, index in [("y", 1), ("0", 0), ("1", 0), ("B", 1), (1, 1), ([1], 1), (" y ", 1)]:
        new = convert(row | {"gold": gold}, "here")
        assert (new["id"], new["answer"]) == (5, index), gold
    for gold in ("z", 2, -1, None, True, "7", [0, 1]):
        with pytest.raises(ValueError, match="here: the answer"):
            convert(row | {"gold": gold}, "here")
    with pytest.raises(ValueError, match=r"unknown fields \['anwser'\]; known are id, question"):
        by_fields({"question": "q", "anwser": "a"})
    with pytest.raises(ValueError, match="names no column for answer"):
        by_fields({"question": "q"})


GOOD = {
    "id": "a",
    "task": "arc_easy",
    "split": "t",
    "question": "Q?",
    "choices": ["x", "y"],
    "answer": 1,
    "level": None,
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list; each line must hold one object"),
        (GOOD | {"choices": ["x"]}, "'choices' is .*; it must be null or a list of two texts or more"),
        (GOOD | {"choices": "xy"}, "'choices' is 'xy'"),
        (GOOD | {"answer": 2}, "'answer' is 2; it must be the index of the right choice, 0 to 1"),
        (GOOD | {"answer": "y"}, "'answer' is 'y'; it must be the index"),
        (GOOD | {"answer": True}, "'answer' is True"),
        (GOOD | {"choices": None, "answer": None}, "'answer' is None; it must be a text, where there are no choices"),
        (GOOD | {"question": None}, "'question' is None; it must be a text"),
        (GOOD | {"level": "hard"}, "'level' is 'hard'"),
        (GOOD | {"aliases": "x"}, "'aliases' is 'x'"),
        (GOOD, "the id 'a' is taken by .*rows.jsonl, line 1; ids must be unique"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    with path.open("a") as file:
        file.write("\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{message}"):
        load_task(str(path))


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(GOOD | {"id": str(n)}) + "\n" for n in range(50)).encode())
    path.write_bytes(whole)
    assert len(load_task(str(path))) == 50 and load_rows(str(path))[7]["id"] == "7"
    path.write_bytes(whole[:-30])
    with pytest.raises(OSError, match="rows.jsonl.gz is damaged after line"):
        load_task(str(path))
    path.write_bytes(b"not gzip")
    with pytest.raises(OSError, match="is damaged after line 0"):
        load_task(str(path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        load_task(str(tmp_path / "latin.jsonl"))
    with pytest.raises(OSError, match="there is no file"):
        load_task(str(tmp_path / "none.jsonl"))
    write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="no rows"):
        load_task(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"unknown task 'arc'; known are .*synth_arith.*hf:DATASET.*arc_easy"):
        load_task("arc")
    write(tmp_path / "rows.jsonl", [GOOD | {"task": "arc_esay"}])
    with pytest.raises(ValueError, match="no prompt form for the task 'arc_esay'"):
        load_task(str(tmp_path / "rows.jsonl"))
    assert load_task(str(tmp_path / "rows.jsonl"), form="question")[0].task == "arc_esay"
    write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r"no rows of the levels \[1, 2\]; there are no levels in this data"):
        load_task(str(tmp_path / "rows.jsonl"), levels="1-2")
    unanswered = GOOD | {"id": "b", "choices": None, "answer": ""}
    path = str(write(tmp_path / "rows.jsonl", [GOOD, unanswered]))
    with pytest.raises(
        ValueError, match=r"1 of 2 rows have an empty answer \(the first is b of arc_easy\).*drop_unanswered"
    ):
        load_task(path)
    assert [item.id for item in load_task(path, drop_unanswered=True)] == ["a"]
    assert [item.answer for item in load_task(path, form="squad_v2")] == [1, "unanswerable"]
    with pytest.raises(ValueError, match="none of the 1 rows has an answer"):
        load_task(str(write(tmp_path / "rows.jsonl", [unanswered])), drop_unanswered=True)
    for name, value in (("limit", 0), ("shots", -1), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}; it must be at least"):
            load_task("synth_arith", **{name: value})


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OSError, match=r'pip install "drllm-fast\[search\]"'):
        load_task("hf:allenai/ai2_arc")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from drllm_fast.smollm2 import converted

    return AutoTokenizer.from_pretrained(converted(progress=False), local_files_only=True)


def test_chat(tokenizer, tmp_path):
    rows = [GOOD, GOOD | {"id": "b", "task": "copa", "question": "It rained therefore"}]
    path = str(write(tmp_path / "rows.jsonl", rows))
    arc, copa = load_task(path, chat=True, tokenizer=tokenizer)
    assert arc.prompt.endswith("<|im_start|>user\nQuestion: Q?\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert arc.choices == copa.choices == ("x", "y")
    free = load_task("synth_arith:1", chat=True, tokenizer=tokenizer, limit=1, shots=2)[0]
    assert free.prompt.count("<|im_start|>user\n") == 1 and free.prompt.count("\n") > 4 and free.choices is None
    for broken in (None, object()):
        with pytest.raises(ValueError, match="chat=True needs a tokenizer with a chat template"):
            load_task(path, chat=True, tokenizer=broken)
    path = str(write(tmp_path / "blimp.jsonl", [GOOD | {"task": "blimp", "question": ""}]))
    with pytest.raises(ValueError, match="row a of blimp asks no question"):
        load_task(path, chat=True, tokenizer=tokenizer)
    assert load_task(path)[0].prompt == ""
