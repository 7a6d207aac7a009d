"""Router checkpoints: what is written, what is read, and what is refused."""

import json
import math
import pickle

import huggingface_hub
import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

from drllm_fast import router_files
from drllm_fast.budget import BudgetTable
from drllm_fast.guard import Guard
from drllm_fast.routers import LayerRouters


@pytest.fixture
def saved(tmp_path):
    routers = LayerRouters.for_model(tiny("llama"), router_size=8, generator=torch.Generator().manual_seed(0))
    routers.knob, routers.grader, routers.margin = -0.6, "exact match", 0.5
    routers.calibration = BudgetTable((0.5, 1.0), (2.0, 0.25), {"prompts": 7})
    routers.guard = Guard.fit(torch.randn(9, routers.hidden_size), prototypes=3)
    routers.save_pretrained(tmp_path / "routers")
    return routers, tmp_path / "routers"


def test_round_trip(saved):
    routers, folder = saved
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "config.json", "routers.safetensors"]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded = LayerRouters.from_pretrained(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.settings() == routers.settings() and loaded.knob == -0.6 and not loaded.training
    assert loaded.calibration == routers.calibration and loaded.margin == 0.5
    assert (
        torch.equal(loaded.guard.prototypes, routers.guard.prototypes) and loaded.guard.radius == routers.guard.radius
    )
    assert loaded.state_dict().keys() == routers.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), routers.parameters(), strict=True))
    loaded.bind(tiny("llama"))
    config = json.loads((folder / "config.json").read_text())
    assert config["classes"] == ["skip", "execute", "repeat"] and config["package_version"]


def test_half_precision_is_stored_as_fp32(saved, tmp_path):
    routers, _ = saved
    routers.half().save_pretrained(tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "routers.safetensors").values()} == {torch.float32}


def test_saving_again_follows_the_attributes_and_keeps_an_edited_card(saved):
    routers, folder = saved
    (folder / "README.md").write_text("mine")
    routers.knob, routers.base_model = 0.25, None
    routers.save_pretrained(folder)
    loaded = LayerRouters.from_pretrained(str(folder))
    assert loaded.knob == 0.25 and loaded.base_model is None
    assert (folder / "README.md").read_text() == "mine"
    with pytest.raises(ValueError, match="config is written from"):
        routers.save_pretrained(folder, config={"knob": 1})


def test_the_card(saved):
    routers, folder = saved
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "drllm-fast" and card.data.base_model is None
    for text in ("routers for llama", "4 layers", "Linear(32, 8)", "exact match", "not recorded", "1,164 parameters"):
        assert text in card.text
    assert sum(p.numel() for p in routers.parameters()) == 1164
    routers.base_model["name"] = "org/model"
    assert routers.generate_model_card().data.base_model == "org/model"
    routers.base_model = None
    assert "a model of these sizes" in routers.generate_model_card().text


def test_the_card_shows_how_to_set_a_budget(saved):
    routers, folder = saved
    card = (folder / "README.md").read_text()
    assert 'of/this/checkpoint", budget=0.9)\n```' in card and "model.routing.budget = ..." in card
    assert "| budgets | 0.5 to 1 of the layers" in card
    for budgets, example in (((0.5, 0.8), "0.8"), ((0.95, 1.1), "0.95"), ((0.7,), "0.7")):
        routers.calibration = BudgetTable(budgets, (1.0,) * len(budgets))
        assert f"budget={example})" in str(routers.generate_model_card())
        routers.calibration.penalty(float(example))
    routers.calibration = None
    plain = str(routers.generate_model_card())
    assert 'of/this/checkpoint")\n```' in plain and "model.routing.budget" not in plain


def test_a_guard_that_the_config_does_not_ask_for_is_left_out(saved):
    """As it is for a moment while a checkpoint is given a guard."""
    _, folder = saved
    edit_config(folder, guard_radius=None)
    assert LayerRouters.from_pretrained(folder).guard is None
    edit_config(folder, guard_radius=2.5)
    with pytest.raises(ValueError, match="radius must be from 0 to 2, got 2.5"):
        LayerRouters.from_pretrained(folder)


@pytest.mark.parametrize("while_saving", [False, True])
def test_push_to_hub_uploads_the_three_files(saved, tmp_path, monkeypatch, while_saving):
    uploaded = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            uploaded.append((repo_id, sorted(f.name for f in folder_path.iterdir())))
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    routers, _ = saved
    if while_saving:
        assert routers.save_pretrained(tmp_path / "again", repo_id="org/routers", push_to_hub=True) == "done"
    else:
        assert routers.push_to_hub("org/routers") == "done"
    assert uploaded == [("org/routers", ["README.md", "config.json", "routers.safetensors"])]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": ["execute", "skip", "repeat"]}, "classes is"),
        ({"classes": None}, "classes is None"),
        ({"pooling": "mean of all tokens"}, "pooling is"),
        ({"format_version": 2}, "format_version is 2"),
        ({"num_layers": 5}, "the config beside it asks for"),
        ({"num_layers": "4"}, "the config beside it asks for"),
        ({"router_size": 9}, "the config beside it asks for"),
        ({"knob": 3}, "knob must be"),
        ({"knob": "x"}, "knob must be"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"base_model": "llama"}, "base_model must be"),
    ],
)
def test_configs_that_mean_something_else(saved, changes, message):
    _, folder = saved
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as info:
        LayerRouters.from_pretrained(folder)
    assert str(folder) in str(info.value)


def test_a_config_that_lacks_something(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    del config["windows"], config["knob"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json lacks windows, knob"):
        LayerRouters.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json holds a list"):
        LayerRouters.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "routers.safetensors"])
def test_missing_and_damaged_files(saved, file):
    _, folder = saved
    whole = (folder / file).read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"\xff" * 100, pickle.dumps({"w1": 1})):
        (folder / file).write_bytes(part)
        with pytest.raises(OSError, match=f"{file} is damaged"):
            LayerRouters.from_pretrained(folder)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        LayerRouters.from_pretrained(folder)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_pickles_are_not_read(saved):
    _, folder = saved
    (folder / "routers.safetensors").unlink()
    for name in ("pytorch_model.bin", "routers.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin.*pickle files are never read"):
        LayerRouters.from_pretrained(folder)
    (folder / "routers.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OSError, match="damaged"):
        LayerRouters.from_pretrained(folder)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda w: w.pop("b2"), "asks for"),
        (lambda w: w.update(extra=torch.zeros(1)), "asks for"),
        (lambda w: w.update(w1=w["w1"].transpose(1, 2).contiguous()), "asks for"),
        (lambda w: w["w2"][1, 0].fill_(math.nan), "w2 .* must be floating and finite"),
        (lambda w: w["b1"][0].fill_(math.inf), "b1 .* must be floating and finite"),
        (lambda w: w.update(b1=w["b1"].to(torch.int32)), "b1 .* must be floating and finite"),
    ],
)
def test_weights_that_are_no_routers(saved, edit, message):
    _, folder = saved
    weights = load_file(folder / "routers.safetensors")
    edit(weights)
    save_file(weights, folder / "routers.safetensors")
    with pytest.raises(ValueError, match=message) as info:
        LayerRouters.from_pretrained(folder)
    assert str(folder / "routers.safetensors") in str(info.value)


def test_from_the_hub(saved, monkeypatch):
    routers, folder = saved
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs["revision"]))
        return str(folder / filename)

    monkeypatch.setattr(router_files, "hf_hub_download", download)
    assert torch.equal(LayerRouters.from_pretrained("org/routers", revision="v1").w1, routers.w1)
    assert asked == [("org/routers", "config.json", "v1"), ("org/routers", "routers.safetensors", "v1")]


@pytest.mark.parametrize("name", ["org/unknown-routers", "./no/such/folder", "a b", "x" * 200])
def test_unknown_ids_and_no_network(name, tmp_path):
    with pytest.raises(OSError, match="no router checkpoint") as info:
        LayerRouters.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert name in str(info.value) and "config.json" in str(info.value)


def test_errors_of_the_http_client_become_os_errors(monkeypatch):
    def download(*args, **kwargs):
        raise RuntimeError("connection reset")

    monkeypatch.setattr(router_files, "hf_hub_download", download)
    with pytest.raises(OSError, match="'org/routers'.*connection reset"):
        LayerRouters.from_pretrained("org/routers")
