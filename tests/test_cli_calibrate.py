"""`drllm-fast calibrate` on a tiny random Llama: what is written, what is printed, what is refused."""

import json
import shutil

import pytest
import torch
from cli_cases import LAYERS, call, ended, free, quiz, refused, tiny_folder
from safetensors.torch import load_file, save_file

from drllm_fast import LayerRouters, cli_calibrate
from drllm_fast.budget import BudgetTable
from drllm_fast.cli_calibrate import parse_budgets
from drllm_fast.cli_models import Dtype, load_model
from drllm_fast.paths import route_paths
from drllm_fast.search.tasks import load_task
from drllm_fast.search.tokens import encode_context
from drllm_fast.training.calibrate import calibrate, fit_guard


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, untrained routers of it, and two tasks."""
    folder = tmp_path_factory.mktemp("made")
    tiny_folder(folder / "tiny", template="{% for m in messages %}<u>{{ m['content'] }}<a>{% endfor %}")
    model, _ = load_model(str(folder / "tiny"), Dtype.auto, "cpu")
    routers = LayerRouters.for_model(model, router_size=8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routers.w1.mul_(4)
    routers.margin = 0.01
    routers.save_pretrained(folder / "routers")
    return folder / "tiny", folder / "routers", quiz(folder / "quiz.jsonl", 60), free(folder / "sums.jsonl", 60)


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "routers")


def run(made, routers, *more, tasks=None):
    named = [text for task in tasks or made[2:] for text in ("--task", task)]
    return call("calibrate", "--model", made[0], "--routers", routers, *named, "--threads", 1, *more)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prompts_of(made, limit=None):
    """Token ids, task and id of each prompt."""
    _, tokenizer = load_model(str(made[0]), Dtype.auto, "cpu")
    items = [item for task in made[2:] for item in load_task(str(task), limit=limit)]
    return [(encode_context(tokenizer, i.prompt, choices=i.choices is not None), i.task, i.id) for i in items]


def parted(made):
    prompts = prompts_of(made)
    held = [cli_calibrate._held_out(id) for _, _, id in prompts]
    return ([p for p, apart in zip(prompts, held, strict=True) if apart is which] for which in (False, True))


def numbers(line):
    """The numbers of a line of the table, or none."""
    try:
        return [float(word) for word in line.split()]
    except ValueError:
        return []


# -- what it does
def test_a_checkpoint_is_calibrated_in_place(made, checkpoint):
    before, weights = contents(checkpoint), LayerRouters.from_pretrained(checkpoint).state_dict()
    result = ended(run(made, checkpoint, "--budgets", "0.6,0.8,1", "--tolerance", 0.02, "--guard-quantile", 0.9))
    assert (
        sorted(contents(checkpoint)) == sorted(before)
        and f"the calibrated routers are in {checkpoint}" in result.stderr
    )
    routers = LayerRouters.from_pretrained(checkpoint)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in routers.state_dict().items())

    # The same by hand, from the prompts that are not held out.
    model, _ = load_model(str(made[0]), Dtype.auto, "cpu")
    measured, held_out = parted(made)
    assert 60 < len(measured) < 100 and {task for _, task, _ in held_out} == {"quiz", "sums"}
    texts = [text for text, _, _ in measured]
    by_hand = LayerRouters.from_pretrained(made[1])
    by_hand.guard = fit_guard(model, texts, quantile=0.9)
    table = calibrate(
        model, by_hand, texts, budgets=[0.6, 0.8, 1], tolerance=0.02, groups=[t for _, t, _ in measured], progress=False
    )
    assert routers.calibration == table and routers.guard.radius == by_hand.guard.radius and routers.margin == 0.01
    assert table.source["prompts"] == len(measured) and table.source["groups"].keys() == {"quiz", "sums"}

    # What is printed is of the others.
    lines = [found for line in result.stdout.splitlines() if len(found := numbers(line)) == 5]
    assert [line[0] for line in lines] == list(table.budgets)
    apart = [text for text, _, _ in held_out]
    for line in lines:
        routers.budget = line[0]
        shares = route_paths(model, apart, routers).double().mean(1)
        of_quiz = shares[[task == "quiz" for _, task, _ in held_out]].mean().item()
        of_sums = shares[[task == "sums" for _, task, _ in held_out]].mean().item()
        assert line[1] == pytest.approx(routers.penalty, rel=1e-3)
        assert line[2:] == pytest.approx([shares.mean().item(), of_quiz, of_sums], abs=6e-4)
    routers.budget, routers.penalty = None, 1e6
    guarded = route_paths(model, apart, routers).double().mean().item()  # the others run nothing
    assert 0 < guarded < 1 and f"guarded (every block once): {guarded:.1%}" in " ".join(result.stdout.split())


def test_into_another_folder(made, checkpoint, tmp_path):
    before = contents(checkpoint)
    output = tmp_path / "new" / "calibrated"
    options = ("--output", output, "--budgets", "0.7..0.9", "--tolerance", 0.05, "--no-guard", "--margin", 0.02)
    result = ended(run(made, checkpoint, *options, tasks=made[2:3]))
    assert contents(checkpoint) == before and sorted(contents(output)) == sorted(before)
    routers = LayerRouters.from_pretrained(output)
    assert routers.guard is None and routers.margin == 0.02 and routers.calibration.source["margin"] == 0.02
    assert {*routers.calibration.budgets, *routers.calibration.source["left_out"]} == {0.7, 0.75, 0.8, 0.85, 0.9}
    assert "guarded" not in result.stdout and "quiz" not in result.stdout  # a single task needs no column of its own
    ended(run(made, checkpoint, *options, tasks=made[2:3]))  # again, into what is a checkpoint by now


def test_calibrating_again_replaces_table_and_guard(made, checkpoint):
    ended(run(made, checkpoint, "--budgets", "0.8,1", "--tolerance", 0.05))
    first = LayerRouters.from_pretrained(checkpoint)
    ended(run(made, checkpoint, "--budgets", "0.7,0.9", "--tolerance", 0.05, "--limit", 30, "--guard-prototypes", 2))
    second = LayerRouters.from_pretrained(checkpoint)
    assert first.calibration.budgets == (0.8, 1.0) and second.calibration.budgets == (0.7, 0.9)
    assert len(first.guard.prototypes) == 32 and len(second.guard.prototypes) == 2
    assert second.calibration.source["prompts"] < 50 < first.calibration.source["prompts"]
    ended(run(made, checkpoint, "--budgets", "0.9", "--tolerance", 0.05, "--no-guard"))
    assert LayerRouters.from_pretrained(checkpoint).guard is None
    assert load_file(checkpoint / "routers.safetensors").keys() == {"w1", "b1", "w2", "b2"}


def test_the_card_follows_unless_it_was_edited(made, checkpoint):
    assert "not calibrated" in (checkpoint / "README.md").read_text()
    ended(run(made, checkpoint, "--budgets", "0.8,1", "--tolerance", 0.05))
    card = (checkpoint / "README.md").read_text()
    assert 'checkpoint", budget=0.9)' in card and "0.8 to 1 of the layers" in card
    (checkpoint / "README.md").write_text(card + "\nMine.\n")
    ended(run(made, checkpoint, "--budgets", "0.7,1", "--tolerance", 0.05))
    assert (checkpoint / "README.md").read_text() == card + "\nMine.\n"


def test_text_files(made, checkpoint, tmp_path):
    paragraphs = [" ".join(f"word{i}" for i in range(start, start + 48)) for start in range(40)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    tasks = [f"text:{tmp_path / 'book.txt'}", made[3]]
    ended(run(made, checkpoint, "--budgets", "1", "--tolerance", 0.3, tasks=tasks))
    groups = LayerRouters.from_pretrained(checkpoint).calibration.source["groups"]
    assert groups.keys() == {"text", "sums"} and groups["text"]["prompts"] < 40


def test_no_document_is_on_both_sides(made, tmp_path):
    """Documents of several rows each; every word says which one it is of."""
    _, tokenizer = load_model(str(made[0]), Dtype.auto, "cpu")
    (tmp_path / "book.txt").write_text("\n\n".join(" ".join([letter] * 400) for letter in "abcdefghijkl"))
    options = {"limit": None, "shots": None, "chat": False, "seed": 0}
    sides = cli_calibrate.read_prompts([f"text:{tmp_path / 'book.txt'}"], tokenizer, **options)
    letters = [{tokenizer.decode(text)[0] for text in texts} for texts, _ in sides]
    assert not letters[0] & letters[1] and letters[0] | letters[1] == set("abcdefghijkl")
    assert len(sides[0][0]) + len(sides[1][0]) > 40


def test_options_of_the_prompts(made, checkpoint, monkeypatch):
    _, tokenizer = load_model(str(made[0]), Dtype.auto, "cpu")
    seen = []

    def instead(model, routers, measured, held_out, *more, **named):
        seen.append([tokenizer.decode(text) for texts, _ in (measured, held_out) for text in texts])
        raise OSError("seen")

    monkeypatch.setattr(cli_calibrate, "run_calibration", instead)
    for more in ((), ("--chat",), ("--shots", 1), ("--limit", 20)):
        refused(run(made, checkpoint, *more, tasks=made[2:3]), "seen")
    plain, chat, shots, limited = seen
    assert len(plain) == 60 and sorted(chat) == sorted(f"<u>{text}<a>" for text in plain)
    assert all(text.count("is") > 1 for text in shots) and set(limited) < set(plain) and len(limited) == 20


def test_parts_of_a_task_are_parted_again(made, checkpoint):
    ended(run(made, checkpoint, "--budgets", "1", "--tolerance", 0.3, tasks=[f"{made[2]}:train"]))
    assert 10 < LayerRouters.from_pretrained(checkpoint).calibration.source["prompts"] < 40


# -- stopping
def test_what_ends_early_leaves_the_checkpoint_as_it_was(made, checkpoint, monkeypatch):
    before = contents(checkpoint)

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    for name in ("drllm_fast.executor.RoutedForward.run_layer", "drllm_fast.cli_calibrate._report"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupted)
            assert run(made, checkpoint, "--budgets", "1", "--tolerance", 0.3).exit_code == 130
        assert contents(checkpoint) == before


@pytest.mark.parametrize("guard", [True, False])
def test_between_two_files_the_checkpoint_is_whole(made, checkpoint, monkeypatch, guard):
    """A process that dies after the first file leaves routers that can be read, with the table of before or after."""
    options = ("--budgets", "1", "--tolerance", 0.3)
    if not guard:
        ended(run(made, checkpoint, *options))
    before = LayerRouters.from_pretrained(checkpoint)
    real, written = cli_calibrate.os.replace, []

    def once(source, target):
        if written:
            raise OSError("the machine is gone")
        written.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("drllm_fast.atomic.os.replace", once)
        refused_at_last(run(made, checkpoint, *options, "--guard" if guard else "--no-guard"), "the machine is gone")
    assert len(written) == 1
    after = LayerRouters.from_pretrained(checkpoint)
    assert after.guard is None and (after.calibration == before.calibration) is guard
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


def refused_at_last(result, *words):
    assert result.exit_code == 2 and "Traceback" not in result.output
    for word in words:
        assert word in " ".join(result.stderr.split())


# -- refusals
@pytest.mark.parametrize(
    "text, budgets",
    [
        ("0.5..1.1", [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1]),
        ("0.5..0.62", [0.5, 0.55, 0.6]),
        ("0.9..0.9", [0.9]),
        ("1,0.8, 0.9", [0.8, 0.9, 1.0]),
    ],
)
def test_budgets_as_text(text, budgets):
    assert parse_budgets(text) == budgets


@pytest.mark.parametrize(
    "text", ["", "many", "0.5..", "..1", "0.9..0.5", "0..1", "0.5,2", "-1", "nan", "inf", "0.5..inf", "0.5..1..2"]
)
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="write 0.8,0.9,1 or 0.5..1.1"):
        parse_budgets(text)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--budgets", "0"], ["--budgets 0: write 0.8,0.9,1"]),
        (["--tolerance", 0], ["--tolerance must be above 0"]),
        (["--margin", -1], ["--margin"]),
        (["--guard-quantile", 0], ["--guard-quantile must be above 0"]),
        (["--limit", 0], ["--limit"]),
        (["--device", "cuda:99"], ["CUDA devices"]),
        (["--model", "./nowhere"], ["no such folder"]),
        (["--output", __file__], ["is a file"]),
        (["--output", __file__ + "/more"], ["cannot write to"]),
        (["--routers", "org/routers"], ["is no folder that could be written to; give --output"]),
    ],
)
def test_bad_options_end_before_the_model_is_loaded(made, checkpoint, monkeypatch, more, words):
    monkeypatch.setattr(cli_calibrate, "load_model", None)
    before = contents(checkpoint)
    refused(run(made, checkpoint, *more), *words)
    assert contents(checkpoint) == before


def test_folders_that_are_none(made, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_calibrate, "load_model", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(run(made, checkpoint, "--output", tmp_path / "mine"), "no router checkpoint: it has letter.txt")
    refused(run(made, tmp_path / "mine"), "letter.txt")
    (checkpoint / "routers.safetensors").write_bytes(b"no")
    refused(run(made, checkpoint), "is damaged")
    refused(call("calibrate", "--model", made[0], "--routers", checkpoint), "--task")


def test_what_needs_the_model(made, checkpoint, tmp_path):
    before = contents(checkpoint)
    other = tiny_folder(tmp_path / "other", seed=1)
    refused(run(made, checkpoint, "--model", other), "these routers are for 'tiny'")
    refused(run(made, checkpoint, "--chat", "--model", other), "has no chat template")
    refused(run(made, checkpoint, tasks=[tmp_path / "none.jsonl"]), "there is no file")
    refused(run(made, checkpoint, "--limit", 1), "has 1 prompts, of too few rows or documents")
    routers = LayerRouters.from_pretrained(checkpoint)
    routers.knob = 0.2
    routers.save_pretrained(tmp_path / "knob")
    refused_at_last(run(made, tmp_path / "knob"), "the knob, and it is at 0.2")
    assert contents(checkpoint) == before


def test_routers_that_keep_none_of_the_budgets(made, checkpoint):
    weights = load_file(checkpoint / "routers.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, checkpoint / "routers.safetensors")
    before = contents(checkpoint)
    refused_at_last(run(made, checkpoint, "--budgets", "0.3,0.9"), "none of the budgets 0.3, 0.9 can be kept to 0.005")
    assert contents(checkpoint) == before
    result = ended(run(made, checkpoint, "--budgets", "0.9,1"))
    assert "left out, for no penalty keeps them: 0.9." in result.stderr
    assert LayerRouters.from_pretrained(checkpoint).calibration.budgets == (1.0,)


def test_a_calibrated_checkpoint_is_used_with_a_budget(made, checkpoint):
    ended(run(made, checkpoint, "--budgets", "0.6,0.9", "--tolerance", 0.05, "--no-guard"))
    command = ("generate", "--model", made[0], "--policy", checkpoint, "--prompt", "What is 3?", "--max-new-tokens", 2)
    paths = []
    for budget in (0.6, 0.9):
        result = json.loads(ended(call(*command, "--json", "--no-chat", "--budget", budget)).stdout)
        paths.append(result["results"][0]["path"])
    routers = LayerRouters.from_pretrained(checkpoint)
    model, tokenizer = load_model(str(made[0]), Dtype.auto, "cpu")
    text = tokenizer("What is 3?")["input_ids"]
    for path, budget in zip(paths, (0.6, 0.9), strict=True):
        routers.budget = budget
        assert route_paths(model, [text], routers).tolist() == [path] and len(path) == LAYERS
    assert isinstance(routers.calibration, BudgetTable)
    refused(call(*command, "--budget", 0.3), "calibrated for budgets from 0.6 to 0.9")
