"""Base model and routers together, and router checkpoints that come with the package."""

import json
import shutil

import pytest
import torch
from cli_cases import tiny_folder
from transformers import AutoModelForCausalLM

import drllm_fast
from drllm_fast import LayerRouters, StaticPolicy, loading, router_files, smollm2

IDS = torch.tensor([[7, 8, 9, 10, 11, 12]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def hub(monkeypatch):
    """No network: what is asked of the Hub is kept, and not there."""
    asked = []

    def download(name, file, **kwargs):
        asked.append(name)
        raise ConnectionError("offline")

    monkeypatch.setattr(router_files, "hf_hub_download", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return asked


def make(base, folder, name=None, seed=0):
    """A checkpoint for the model in `base`, that calls it `name`."""
    routers = LayerRouters.for_model(
        AutoModelForCausalLM.from_pretrained(base), router_size=8, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        routers.w2.mul_(4)
    if name is not None:
        routers.base_model["name"] = str(name)
    routers.save_pretrained(folder)
    return routers


@pytest.fixture
def bundle(monkeypatch, tmp_path):
    """A folder that stands for the package's own."""
    monkeypatch.setattr(router_files, "files", lambda package: tmp_path / "package")
    return tmp_path / "package" / "data" / "routers"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# -- both together
def test_the_base_model_of_the_checkpoint_is_loaded_and_routed(base, tmp_path):
    routers = make(base, tmp_path / "routers", base)
    model = drllm_fast.from_pretrained(tmp_path / "routers")
    expected = AutoModelForCausalLM.from_pretrained(base)
    dense = logits(expected)
    expected.enable_dynamic_routing(routers)
    assert torch.equal(logits(model), logits(expected)) and torch.equal(model.routing.plan, expected.routing.plan)
    assert not torch.equal(model.routing.plan, torch.ones_like(model.routing.plan)) and not model.training
    model.disable_dynamic_routing()
    assert torch.equal(logits(model), dense)


def test_a_base_model_elsewhere(base, tmp_path, hub):
    """Only the last part of its folder is kept in a checkpoint."""
    routers = make(base, tmp_path / "routers")
    assert routers.base_model["name"] == "base"
    with pytest.raises(OSError, match="base model 'base' of these routers cannot be loaded.*say with base="):
        drllm_fast.from_pretrained(tmp_path / "routers")
    for given in (str(tmp_path / "routers"), routers):
        model = drllm_fast.from_pretrained(given, base=base, dtype=torch.float64)
        assert model.dtype == torch.float64 and isinstance(model.routing.policy, LayerRouters)
        logits(model)


def test_a_folder_beside_the_user_is_found_by_its_name(base, tmp_path, monkeypatch):
    make(base, tmp_path / "routers")
    monkeypatch.chdir(base.parent)
    assert drllm_fast.from_pretrained(tmp_path / "routers").name_or_path == "base"


def test_arguments_of_transformers_pass_and_others_do_not(base, tmp_path):
    make(base, tmp_path / "routers", base)
    model = drllm_fast.from_pretrained(tmp_path / "routers", attn_implementation="eager", device_map="cpu")
    assert model.config._attn_implementation.endswith("eager")
    with pytest.raises(TypeError, match="bugdet"):
        drllm_fast.from_pretrained(tmp_path / "routers", bugdet=0.9)


def test_the_tokenizer(base, tmp_path):
    make(base, tmp_path / "routers", base)
    tokenizer = loading.tokenizer_for(tmp_path / "routers")
    assert tokenizer.decode(tokenizer.encode("some text")) == "some text"
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<pad>"
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    assert loading.tokenizer_for(tmp_path / "routers", base=bare).pad_token == "<end>"


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "SmolLM2-135M-Instruct"])
def test_the_bundled_model(base, tmp_path, monkeypatch, name):
    """By its name, whatever folder of that name is near: a folder of routers may have it, too."""
    make(base, tmp_path / "routers", name)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "converted", lambda: base)
    model = drllm_fast.from_pretrained(tmp_path / "routers")
    assert model.name_or_path == model.config.name_or_path == "smollm2-135m-instruct"
    assert model.dtype == torch.bfloat16
    assert drllm_fast.from_pretrained(tmp_path / "routers", dtype=torch.float32).dtype == torch.float32
    assert loading.tokenizer_for(tmp_path / "routers").padding_side == "left"


def test_the_bundled_model_itself(tmp_path):
    model, tokenizer = smollm2.load_smollm2(torch.float32, progress=False)
    routers = LayerRouters.for_model(model, router_size=8)
    routers.save_pretrained(tmp_path / "routers")
    again = drllm_fast.from_pretrained(tmp_path / "routers", dtype=torch.float32)
    ids = tokenizer("Where to?", return_tensors="pt").input_ids
    with torch.no_grad(), again.routing.disabled():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loading.tokenizer_for(routers).encode("Where to?") == ids[0].tolist()


def test_refusals(base, tmp_path, hub):
    routers = make(base, tmp_path / "routers", base)
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="is not the model of the fingerprint"):
        drllm_fast.from_pretrained(routers, base=other)
    for wrong in (AutoModelForCausalLM.from_pretrained(base), 3):
        with pytest.raises(TypeError, match="base must be a folder"):
            drllm_fast.from_pretrained(routers, base=wrong)
        with pytest.raises(TypeError, match="routers must be a checkpoint"):
            drllm_fast.from_pretrained(wrong)
    with pytest.raises(TypeError, match="got StaticPolicy"):
        drllm_fast.from_pretrained(StaticPolicy([1], num_layers=4, budget=1.0))
    for name in ("org/no-such-model", "no such name", "a//b", str(tmp_path / "nowhere")):
        with pytest.raises(OSError, match="these routers cannot be loaded"):
            drllm_fast.from_pretrained(routers, base=name)
        with pytest.raises(OSError, match="these routers cannot be loaded"):
            loading.tokenizer_for(routers, base=name)
    with pytest.raises(ValueError, match="budget"):
        drllm_fast.from_pretrained(routers, budget=0.5)  # they are not calibrated
    routers.base_model = None
    with pytest.raises(ValueError, match="do not say which model they are for; give base="):
        drllm_fast.from_pretrained(routers)
    with pytest.raises(ValueError, match="do not say which model they are for; give base="):
        loading.tokenizer_for(routers)
    assert drllm_fast.from_pretrained(routers, base=base).routing.policy is routers


# -- checkpoints of the package
def test_bundled_names(base, tmp_path, bundle, hub, monkeypatch):
    assert router_files.bundled_routers() == {}
    one, two = make(base, bundle / "one", base), make(base, bundle / "two", base, seed=1)
    (bundle / "no checkpoint").mkdir()
    assert router_files.bundled_routers() == {"one": bundle / "one", "two": bundle / "two"}
    assert torch.equal(LayerRouters.from_pretrained("one").w1, one.w1)
    assert torch.equal(LayerRouters.from_pretrained("two").w1, two.w1) and not torch.equal(one.w1, two.w1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.enable_dynamic_routing("two")
    assert torch.equal(model.routing.policy.w1, two.w1)
    assert torch.equal(drllm_fast.from_pretrained("one").routing.policy.w1, one.w1)
    assert hub == []

    with pytest.raises(OSError, match=r"no router checkpoint 'three'.*not bundled \(those are: one, two\)"):
        LayerRouters.from_pretrained("three")
    assert hub == ["three"]

    mine = make(base, tmp_path / "here" / "one", base, seed=2)
    monkeypatch.chdir(tmp_path / "here")
    assert torch.equal(LayerRouters.from_pretrained("one").w1, mine.w1)  # the user's own folder comes first


def test_a_bundled_checkpoint_that_is_incomplete_is_not_sought_elsewhere(base, bundle, hub):
    make(base, bundle / "one", base)
    (bundle / "one" / "routers.safetensors").unlink()
    with pytest.raises(OSError, match="routers.safetensors is missing"):
        LayerRouters.from_pretrained("one")
    assert hub == []


def test_the_package_knows_its_own_folder():
    """What is bundled can be read, and lies in the package."""
    for name, folder in router_files.bundled_routers().items():
        assert folder.parent.parent.parent.name == "drllm_fast"
        assert LayerRouters.from_pretrained(name).base_model is not None
