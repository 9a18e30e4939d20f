"""Loading: every form of `MODEL` string, what it gives, and what is said where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from surgery.adapters import adapter_for, get_adapter, load_model, parse_spec, registry
from surgery.adapters.base import library
from surgery.calling import evaluating
from surgery.errors import CheckpointError, DataError, MissingDependency, SurgeryError, UnknownModel

BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
}
TIMM = "resnet10t"


def tiny_bert(**changes):
    config = transformers.BertConfig(**{**BERT, **changes})
    return transformers.BertForSequenceClassification(config).eval()


def same_weights(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---------------------------------------------------------------- strings


def test_options_are_read_as_python_values():
    spec = parse_spec("timm:a?x=1&y=0.5&z=true&w=none&v=0.4,0.5&path=a%26b+c.safetensors")
    assert spec.options == {"x": 1, "y": 0.5, "z": True, "w": None, "v": [0.4, 0.5], "path": "a&b+c.safetensors"}


def test_a_drive_letter_is_no_prefix():
    assert parse_spec(r"C:\models\a").prefix == ""


@pytest.mark.parametrize("text", ["", "timm:", "timm:resnet18?num_classes", "timm:resnet18?=3"])
def test_malformed_strings_are_refused(text):
    with pytest.raises(UnknownModel, match=r"names no model|must read name=value"):
        parse_spec(text)


# ---------------------------------------------------------------- registry


def test_importing_adapters_imports_no_ecosystem():
    code = "import sys, surgery.adapters; print([m for m in ('timm', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_adapter_follows_the_class():
    class Mine(transformers.BertModel):
        pass

    assert adapter_for(Mine(transformers.BertConfig(**BERT))).name == "huggingface"
    assert adapter_for(timm.create_model(TIMM)).name == "timm"
    assert adapter_for(torch.nn.Sequential(timm.create_model(TIMM))).name == "plain"


def test_unknown_adapters_are_answered_with_near_names():
    with pytest.raises(UnknownModel, match="did you mean huggingface"):
        get_adapter("hugingface")


@pytest.fixture
def entry_points(monkeypatch):
    def install(*points):
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        registry.table.cache_clear()

    yield install
    registry.table.cache_clear()


def test_outsiders_register_by_entry_point(entry_points):
    entry_points(EntryPoint("torchvision", "surgery.adapters.plain:ADAPTER", registry.GROUP))
    assert "torchvision" in registry.adapter_names()
    assert get_adapter("torchvision") is get_adapter("plain")


def test_a_second_adapter_of_the_same_name_is_an_error(entry_points):
    entry_points(EntryPoint("timm", "theirs:ADAPTER", registry.GROUP))
    with pytest.raises(SurgeryError, match=r"'timm' is offered twice: by bypass-surgery and by theirs:ADAPTER"):
        registry.table()


def test_a_missing_library_is_answered_with_the_install_line():
    with pytest.raises(MissingDependency, match=r'pip install "bypass-surgery\[data\]"'):
        library("no_such_library", "bypass-surgery[data]")


def test_evaluating_gives_every_mode_back():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())
    model.train()
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model] == [True, False]


# ---------------------------------------------------------------- timm


def test_timm_options_reach_the_model_and_the_preprocessing():
    loaded = load_model(f"timm:{TIMM}?pretrained=false&num_classes=7&mean=0.5&std=0.25&input_size=3,96,96&crop_pct=1.0")
    assert loaded.num_classes == 7
    assert not loaded.model.training
    picture = torch.ones(3, 96, 96)
    torch.testing.assert_close(loaded.preprocess({"image": picture}), torch.full((3, 96, 96), 2.0))
    assert adapter_for(loaded.model).example(loaded.model, 3).args[0].shape == (3, 3, 96, 96)


def test_timm_grey_pictures():
    loaded = load_model(f"timm:{TIMM}?pretrained=false&in_chans=1&input_size=64")
    assert loaded.preprocess({"image": torch.rand(3, 80, 80)}).shape == (1, 64, 64)
    assert loaded.adapter.example(loaded.model).args[0].shape == (2, 1, 64, 64)


def test_timm_weights_from_a_file(tmp_path):
    source = timm.create_model(TIMM, num_classes=5)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(f"timm:{TIMM}?num_classes=5&checkpoint={tmp_path / 'w.safetensors'}")
    assert same_weights(loaded.model, source)

    with pytest.raises(CheckpointError, match=r"does not fit ResNet[\s\S]*fc\.weight"):
        load_model(f"timm:{TIMM}?num_classes=6&checkpoint={tmp_path / 'w.safetensors'}")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(f"timm:{TIMM}?checkpoint={tmp_path / 'absent.safetensors'}")


@pytest.mark.parametrize("form", ["{}", "hf:{}", "timm:{}"])
def test_timm_directory(tmp_path, form):
    source = timm.create_model(TIMM, num_classes=5)
    timm.models.save_for_hf(source, tmp_path / "net", safe_serialization=True)
    loaded = load_model(form.format(tmp_path / "net"))
    assert loaded.adapter.name == "timm"
    assert same_weights(loaded.model, source)
    assert loaded.adapter.reference(loaded.model)["base"] == form.format(tmp_path / "net")


def test_base_config_rebuilds_a_timm_model(tmp_path):
    source = load_model(f"timm:{TIMM}?pretrained=false&num_classes=5&mean=0.5").model
    (tmp_path / "config.json").write_text(json.dumps(get_adapter("timm").base_config(source)))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    again = load_model(str(tmp_path))
    assert same_weights(again.model, source)
    assert again.model.pretrained_cfg["mean"] == [0.5] * 3


def test_half_precision_becomes_float32_on_the_cpu_unless_asked(tmp_path):
    tiny_bert().half().save_pretrained(tmp_path)
    assert next(load_model(str(tmp_path)).model.parameters()).dtype is torch.float32
    assert next(load_model(str(tmp_path), dtype=torch.float16).model.parameters()).dtype is torch.float16


def test_near_names_of_timm():
    with pytest.raises(UnknownModel, match="did you mean timm:resnet50"):
        load_model("timm:resnet_50")
    with pytest.raises(UnknownModel, match=r"no pretrained weights 'a9_in1k'; there are: .*a1_in1k"):
        load_model("timm:resnet50.a9_in1k")
    with pytest.raises(UnknownModel, match="refuses an option"):
        load_model(f"timm:{TIMM}?pretrained=false&no_such_option=3")
    with pytest.raises(UnknownModel, match="mean must have 1 or 3 numbers, got 2"):
        load_model(f"timm:{TIMM}?pretrained=false&mean=0.5,0.5")


# ---------------------------------------------------------------- transformers


def test_huggingface_directory(tmp_path):
    source = tiny_bert(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    source.save_pretrained(tmp_path)
    for text in (str(tmp_path), f"hf:{tmp_path}"):
        loaded = load_model(text)
        assert type(loaded.model) is transformers.BertForSequenceClassification
        assert same_weights(loaded.model, source)
        assert loaded.label_names == ("no", "yes")
        assert loaded.num_classes == 2
        assert loaded.tokenizer is None
        assert loaded.adapter.reference(loaded.model) == {
            "library": "transformers",
            "class": "transformers.models.bert.modeling_bert.BertForSequenceClassification",
            "base": text,
            "revision": "",
        }


def test_the_class_can_be_chosen(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    loaded = load_model(f"{tmp_path}?class=AutoModelForTokenClassification&num_labels=4&pretrained=false")
    assert type(loaded.model) is transformers.BertForTokenClassification
    assert loaded.model.config.num_labels == 4
    with pytest.raises(UnknownModel, match=r"did you mean .*BertForSequenceClassification"):
        load_model(f"{tmp_path}?class=BertForSequenceClassifcation")


def test_reference_of_models_not_loaded_here(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert adapter_for(model).reference(model)["base"] == str(tmp_path)
    assert adapter_for(tiny_bert()).reference(tiny_bert())["base"] == ""
    assert get_adapter("timm").reference(timm.create_model("resnet50"))["base"] == "timm:resnet50.a1_in1k"


def test_directories_that_hold_no_model(tmp_path):
    (tmp_path / "model-a").mkdir()
    with pytest.raises(UnknownModel, match=r"holds no config.json; found: nothing"):
        load_model(str(tmp_path / "model-a"))
    with pytest.raises(UnknownModel, match=r"did you mean .*model-a"):
        load_model(str(tmp_path / "model-b"))
    (tmp_path / "model-a" / "config.json").write_text("{")
    with pytest.raises(UnknownModel, match="not valid JSON"):
        load_model(str(tmp_path / "model-a"))
    (tmp_path / "model-a" / "config.json").write_text('{"layers": 3}')
    with pytest.raises(UnknownModel, match=r"neither 'model_type' .* found: layers"):
        load_model(str(tmp_path / "model-a"))
    (tmp_path / "model-a" / "config.json").rename(tmp_path / "model-a" / "surgery_config.json")
    with pytest.raises(UnknownModel, match=r"converted model: `surgery show DIR` .* surgery\.load loads it"):
        load_model(str(tmp_path / "model-a"))


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    (tmp_path / "model-a").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in (f"hf:{tmp_path}/model-b", "hf:./nets/model-b", "hf:../model-b", "hf:nets/mine/model-b"):
        with pytest.raises(UnknownModel, match=f"directory {text[3:]} does not exist"):
            load_model(text)
    for text in (f"hf:{tmp_path}/model-b", "hf:~/model-b", "hf:~/model-a"):
        with pytest.raises(UnknownModel, match=f"did you mean {tmp_path}/model-a"):
            load_model(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("resnet50", "timm:resnet50"),
        ("google/vit-base-patch16-224", "hf:google/vit-base-patch16-224"),
        ("nets/mine.py", r"python:nets/mine\.py:<function>"),
        ("tim:resnet50", "timm:resnet50"),
    ],
)
def test_strings_without_a_known_prefix(text, hint):
    with pytest.raises(UnknownModel, match=f"did you mean .*{hint}"):
        load_model(text)


# ---------------------------------------------------------------- networks of the user's own

NETWORK = """
from pathlib import Path
from torch import Tensor
import torch
import helper_of_mine

def net(width=4, half=False):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width))
    return model.half() if half else model

def both():
    return net(), lambda picture: picture.flatten()

def nothing():
    return 3

def normalise(x, scale=2):
    return x / scale

def confused():
    return net(1 + "2")
"""


@pytest.fixture
def network(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("")
    (tmp_path / "my_net.py").write_text(NETWORK)
    return tmp_path / "my_net.py"


def test_a_function_in_a_file(network):
    loaded = load_model(f"python:{network}:net?width=6&mean=0.5&std=0.5&size=8")
    assert loaded.model[1].out_features == 6
    assert loaded.adapter.name == "plain"
    torch.testing.assert_close(loaded.preprocess({"image": torch.ones(1, 8, 8)}), torch.ones(1, 8, 8))
    assert loaded.adapter.reference(loaded.model)["base"].endswith("my_net.py:net?width=6&mean=0.5&std=0.5&size=8")
    assert str(network.parent) not in sys.path
    assert load_model(f"python:{network}:net?half=true").model[1].weight.dtype is torch.float32


def test_a_function_that_brings_its_preprocessing(network):
    loaded = load_model(f"python:{network}:both")
    assert loaded.preprocess({"image": torch.zeros(1, 8, 8)}).shape == (64,)


def test_what_cannot_be_a_network(network):
    with pytest.raises(UnknownModel, match=r"did you mean .*my_net.py"):
        load_model(f"python:{network.parent / 'my_nett.py'}:net")
    with pytest.raises(UnknownModel, match="no function 'nett' there; found: net"):
        load_model(f"python:{network}:nett")
    with pytest.raises(UnknownModel, match=r"must return an nn.Module .* got int"):
        load_model(f"python:{network}:nothing")
    with pytest.raises(UnknownModel, match="refuses an option"):
        load_model(f"python:{network}:net?depth=3")
    with pytest.raises(
        UnknownModel, match=r"normalise\(x, scale=2\) cannot be called with nothing: missing a required argument: 'x'"
    ):
        load_model(f"python:{network}:normalise")
    with pytest.raises(
        UnknownModel, match=r"no function 'nope' there; found: net, both, nothing, normalise, confused$"
    ):
        load_model(f"python:{network}:nope")
    with pytest.raises(UnknownModel, match=r"confused failed in my_net.py, line \d+: TypeError"):
        load_model(f"python:{network}:confused")
    with pytest.raises(UnknownModel, match="expected python:path"):
        load_model("python:my_net")
    Path(network).write_text("1 / 0")
    with pytest.raises(UnknownModel, match="failed: ZeroDivisionError"):
        load_model(f"python:{network}:net")


def test_nothing_is_known_about_the_inputs_of_a_users_network():
    model = torch.nn.Linear(1, 1)
    for ask in (adapter_for(model).example, lambda m: adapter_for(m).inputs(m, 4)):
        with pytest.raises(
            DataError, match=r"Linear is a network of your own.*--data in the shell.*example=<one batch>"
        ):
            ask(model)
