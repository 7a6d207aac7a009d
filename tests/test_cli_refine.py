"""`drllm-fast refine` on a tiny random Llama and routers that were never trained."""

import json

import pytest
import torch
from cli_cases import LAYERS, TEMPLATE, call, contents, ended, free, quiz, refused, tiny_folder

import drllm_fast
from drllm_fast import LayerRouters, cli_refine
from drllm_fast.cli_models import Dtype, load_model
from drllm_fast.search.tasks import load_task
from drllm_fast.search.tokens import encode_context
from drllm_fast.training import refine_state as module
from drllm_fast.training.calibrate import BUDGETS, calibrate
from drllm_fast.training.refine import refine
from drllm_fast.training.refine_config import RefineConfig

SETTINGS = {"steps": 20, "every": 10, "batch_size": 4, "samples": 4}
QUICK = ("--steps", 20, "--every", 10, "--batch-size", 4, "--samples", 4, "--lr", 1e-2, "--tracker", "none")
TEXT = "\n\n".join(
    " ".join(f"word{(7 * document + place) % 23}" for place in range(100)) + "." for document in range(8)
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model, routers of it in a folder, and a task."""
    folder = tmp_path_factory.mktemp("given")
    model = tiny_folder(folder / "tiny")
    loaded, _ = load_model(str(model), Dtype.auto, "cpu")
    routers = LayerRouters.for_model(loaded, router_size=8, windows=3, generator=torch.Generator().manual_seed(0))
    routers.save_pretrained(folder / "routers")
    return model, folder / "routers", quiz(folder / "quiz.jsonl", 40)


def run(given, output, *more, tasks=None):
    model, routers, quiz = given
    named = [text for task in tasks or [quiz] for text in ("--task", task)]
    return call(
        "refine", "--model", model, "--routers", routers, *named, "--output", output, *QUICK, "--threads", 1, *more
    )


def report(output):
    return json.loads((output / "report.json").read_text())


def same(a, b):
    return all(torch.equal(v, b.state_dict()[name]) for name, v in a.state_dict().items())


def test_a_refinement_ends_with_calibrated_routers_and_its_report(given, tmp_path):
    output = tmp_path / "out"
    result = ended(run(given, output))
    model, tokenizer = load_model(str(given[0]), Dtype.auto, "cpu")
    items = load_task(str(given[2]))
    found, saved = report(output), LayerRouters.from_pretrained(output)
    assert found["prompts"] == 40 and len(found["held_out"]) == 4 and found["refinement"]["kept"] > 0
    assert found["held_out"] == [f"quiz/{items[n].id}" for n in found["refinement"]["validation"]]
    assert (found["model"], found["routers"], found["tasks"]) == ("tiny", "routers", ["quiz.jsonl"])
    assert "40 prompts from" in result.stderr and "budget 0.9:" in result.stdout and "mean kl" in result.stdout

    # By hand, from the same parts.
    routers = LayerRouters.from_pretrained(given[1])
    config = RefineConfig(**SETTINGS, learning_rate=1e-2)
    by_hand = refine(model, tokenizer, routers, items, config=config, progress=False)
    assert same(routers, saved) and not same(routers, LayerRouters.from_pretrained(given[1]))
    assert by_hand.text().splitlines()[-1] in result.stdout
    prompts = [encode_context(tokenizer, item.prompt, choices=True) for item in items]
    table = calibrate(model, routers, prompts, budgets=sorted({*BUDGETS, 0.95, 0.9, 0.8}), progress=False)
    assert (saved.calibration.budgets, saved.calibration.penalties) == (table.budgets, table.penalties)
    assert found["calibration"]["penalties"] == list(table.penalties)
    drllm_fast.enable_dynamic_routing(model, str(output), budget=table.budgets[0])
    model(torch.tensor([prompts[0]]))
    assert model.routing.plan.shape == (1, LAYERS)


def test_the_same_command_goes_on(given, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended(run(given, whole))
    step = module.Refinement.take_step

    def interrupted(self):
        if self.step == 13:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(module.Refinement, "take_step", interrupted)
        result = run(given, parts)
    assert result.exit_code == 130 and "run the same command to go on" in result.stderr
    assert not (parts / "config.json").exists()
    taken = []
    monkeypatch.setattr(module.Refinement, "take_step", lambda self: taken.append(1) or step(self))
    ended(run(given, parts))
    assert len(taken) == 10 and same(LayerRouters.from_pretrained(whole), LayerRouters.from_pretrained(parts))
    ended(run(given, parts))
    assert len(taken) == 10 and same(LayerRouters.from_pretrained(whole), LayerRouters.from_pretrained(parts))
    before = contents(parts / "refining")
    refused(run(given, parts, "--reward", "margin"), "config.reward is 'kl', not 'margin'")
    assert contents(parts / "refining") == before


def test_options_reach_the_refinement(given, tmp_path):
    more = (
        "--reward", "margin", "--budgets", "0.9,0.7", "--lr", 1e-3, "--temperature", 0.5, "--anchor", 0.2,
        "--validation", 0.5, "--seed", 3, "--limit", 8, "--steps", 2,
    )  # fmt: skip
    ended(run(given, tmp_path / "out", *more))
    found = report(tmp_path / "out")
    assert found["prompts"] == 8 and found["refinement"]["config"] == {
        "reward": "margin", "budgets": [0.7, 0.9], "steps": 2, "batch_size": 4, "samples": 4, "temperature": 0.5,
        "learning_rate": 1e-3, "clip": 1.0, "anchor": 0.2, "dual_rate": 1.0, "every": 10, "validation": 0.5, "seed": 3,
    }  # fmt: skip


def test_unlabelled_text_is_held_out_by_document(given, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    tasks = [f"text:{tmp_path / 'book.txt'}", free(tmp_path / "free.jsonl", 6)]
    ended(run(given, tmp_path / "out", "--validation", 0.4, "--steps", 1, "--seed", 1, tasks=tasks))
    held = report(tmp_path / "out")["held_out"]
    texts = [name.split("/")[1] for name in held if name.startswith("text/")]
    places = [item.id for item in load_task(tasks[0], seed=1)]
    assert 0 < len(set(texts)) < 8 and len(places) > 8
    assert sorted(texts) == sorted(place.split("/")[0] for place in places if place.split("/")[0] in set(texts))
    assert 0 < len(held) - len(texts) < 6, held


def test_routers_that_do_not_improve_keep_their_table(given, tmp_path, monkeypatch):
    model, tokenizer = load_model(str(given[0]), Dtype.auto, "cpu")
    routers = LayerRouters.from_pretrained(given[1])
    routers.calibration = {"budgets": [0.5, 0.9], "penalties": [0.3, 0.1], "source": {}}
    routers.save_pretrained(tmp_path / "calibrated")
    measured = module.Refinement.measure

    def worse(self, begun, steps):
        found = measured(self, begun, steps)
        return module.Measurement(**{**vars(found), "values": [-float(self.step)] * len(found.values)})

    monkeypatch.setattr(module.Refinement, "measure", worse)
    result = ended(run((given[0], tmp_path / "calibrated", given[2]), tmp_path / "out", "--steps", 2))
    saved = LayerRouters.from_pretrained(tmp_path / "out")
    assert "The routers are unchanged" in result.stdout and saved.calibration == routers.calibration
    assert same(routers, saved) and report(tmp_path / "out")["calibration"]["penalties"] == [0.3, 0.1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--budgets", "most"], ["--budgets most: write 0.8,0.9,1"]),
        (["--budgets", "0.8,2"], ["--budgets 0.8,2: write"]),
        (["--batch-size", 2], ["batch_size must be at least 3"]),
        (["--validation", 0], ["validation must be above 0"]),
        (["--lr", 0], ["learning_rate must be a number above 0"]),
        (["--samples", 1], ["--samples"]),
        (["--reward", "exact"], ["--reward", "exact"]),
        (["--device", "cuda:99"], ["CUDA devices"]),
        (["--task", "arc_esay"], ["unknown task 'arc_esay'"]),
        (["--routers", "/nowhere/at/all"], ["/nowhere/at/all"]),
    ],
)
def test_bad_options_end_before_the_model_is_loaded(given, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(cli_refine, "load_model", None)
    refused(run(given, tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(given, tmp_path):
    output = tmp_path / "out"
    refused(
        run(given, output, "--reward", "margin", tasks=[free(tmp_path / "free.jsonl", 6)]), "margin compares choices"
    )
    refused(run(given, output, "--limit", 3), "too few for 3 budgets")
    refused(run(given, output, "--chat"), "--chat: the tokenizer of", "no chat template")
    other = tiny_folder(tmp_path / "other", template=TEMPLATE, seed=1)
    refused(run((other, *given[1:]), output), "these routers are for 'tiny'")
    ended(run(given, output, "--steps", 1))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "page.txt").write_text("mine")
    refused(run(given, tmp_path / "thesis"), "not empty and no output of a refinement", "page.txt")
    assert contents(tmp_path / "thesis") == {"page.txt": b"mine"}


def test_a_spoilt_model_is_one_message(given, tmp_path, monkeypatch):
    def spoilt(self, numbers, paths):
        raise FloatingPointError("the kl of item q1 is nan")

    monkeypatch.setattr(module.PathValues, "__call__", spoilt)
    refused(run(given, tmp_path / "out"), "the kl of item q1 is nan")
