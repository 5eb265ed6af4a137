"""Inference of the network from names and shapes, checked against golden ones, and errors that show what was found."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from utils_architecture import get_new_model, normalize_model
from zoo.description import NetworkDescription
from zoo.inference import Description, _NumbersOnCPU, check_description, describe_weights
from zoo.loading import Weights, has_normalizer, parse_weights
from zoo.models import build_model
from zoo.robustbench import robustbench_entry
from zoo.runs import load_trained

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text())


def weights_of(shapes, normalized=False):
    """Weights with names and shapes alone."""
    network = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    statistics = {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    return Weights(network, statistics if normalized else None)


def golden(key, classes=1000, positions=None, normalized=False):
    """Published names and shapes, with another head or other position embeddings."""
    shapes = dict(GOLDEN[key]["state_dict"])
    for name in ("head.fc.weight", "head.fc.bias", "head.weight", "head.bias"):
        if name in shapes:
            shapes[name] = [classes, *shapes[name][1:]]
    if positions is not None:
        shapes["pos_embed"] = [1, positions, shapes["pos_embed"][-1]]
    return weights_of(shapes, normalized)


def state(arch, **arguments):
    return get_new_model(arch, num_classes=4, **arguments).state_dict()


@pytest.mark.parametrize("key", [key for key, entry in GOLDEN.items() if "state_dict" in entry])
@pytest.mark.parametrize("classes", [1000, 10])
@pytest.mark.parametrize("normalized", [False, True])
def test_published_shapes(key, classes, normalized):
    arch, stem = key.split("/not_original=")
    found = describe_weights(golden(key, classes, normalized=normalized))
    assert arch in found.candidates and found.alike and found.arch == found.candidates[0]
    assert (found.not_original, found.updated) == (stem == "1", False)
    assert (found.num_classes, found.add_normalization) == (classes, normalized)
    assert found.img_size == (224 if arch.startswith(("vit", "deit")) else None)


@pytest.mark.parametrize("not_original", [False, True])
def test_updated(not_original):
    with torch.random.fork_rng():
        network = get_new_model("convnext_iso", updated=True, not_original=not_original, num_classes=5).state_dict()
    found = describe_weights(Weights(network, None))
    assert (found.arch, found.updated, found.not_original, found.num_classes) == ("convnext_iso", True, not_original, 5)


@pytest.mark.parametrize(
    "arch, positions, size",
    [
        ("vit_b", 1 + 24**2, 384),
        ("vit_b", 1 + 14**2, 224),
        ("vit_m", 16**2, 256),
        ("vit_m", 1 + 16**2, None),
        ("vit_b", 300, None),
    ],
)
def test_size_of_position_embeddings(arch, positions, size):
    found = describe_weights(golden(f"{arch}/not_original=1", positions=positions))
    assert (found.img_size, found.arch) == (size, arch if size else None)


def test_several_names_for_one_network():
    found = describe_weights(golden("vit_s/not_original=1"))
    assert found.candidates == ("vit_s", "deit_s") and found.alike
    assert describe_weights(golden("vit_s/not_original=1"), "deit_s").arch == "deit_s"


def test_same_weights_of_different_networks(tmp_path):
    """A guess between ReLU and GELU would show as a bad accuracy."""
    network = state("resnet50")
    found = describe_weights(Weights(network, None))
    assert found.candidates == ("resnet50", "resnet50_gelu") and not found.alike
    torch.save(network, tmp_path / "w.pt")
    with pytest.raises(UserError, match="resnet50 and resnet50_gelu.*functions; give arch"):
        load_trained(tmp_path / "w.pt", NetworkDescription())
    trained = load_trained(tmp_path / "w.pt", NetworkDescription(arch="resnet50_gelu"))
    assert "GELU" in str(trained.model) and trained.description["num_classes"] == 4


@pytest.mark.parametrize("network", [{}, {"x": torch.zeros(2)}, {"head.bias": torch.tensor(1.0)}])
def test_nothing_known(network):
    nothing = Description(add_normalization=False)
    assert describe_weights(Weights(network, None)) == nothing and str(nothing) == "no known architecture"
    with pytest.raises(UserError, match="does not fit a known architecture. The nearest is .* is missing"):
        check_description(Weights(network, None), {}, source="x.pt")


def test_the_random_state_stays():
    before = torch.get_rng_state()
    describe_weights(golden("convnext_tiny/not_original=1"))
    assert torch.equal(torch.get_rng_state(), before)


BASE = "convnext_base/not_original=1"
WRONG = {
    "architecture": (BASE, {"arch": "convnext_tiny"}, ["arch=convnext_tiny"]),
    "stem": (BASE, {"not_original": False}, ["not_original=0"]),
    "stem of the right architecture": (BASE, {"arch": "convnext_base", "not_original": False}, ["=0"]),
    "classes": (BASE, {"num_classes": 10}, ["num_classes=10"]),
    "width": (BASE, {"updated": True}, ["updated=1"]),
    "all": (
        BASE,
        {"arch": "vit_s", "not_original": False, "updated": True, "num_classes": 10},
        ["arch=vit_s, not_original=0, updated=1, num_classes=10"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_asked_for_something_else(case):
    key, asked, expected = WRONG[case]
    with pytest.raises(UserError) as error:
        check_description(golden(key), asked, source="x.pt", by="the table")
    message = str(error.value)
    assert message.startswith("x.pt does not fit: it is convnext_base with ConvStem and 1000 classes; ")
    assert message.endswith("(the table).") and all(words in message for words in expected)


def test_normaliser_not_asked_for():
    weights = golden(BASE, normalized=True)
    with pytest.raises(UserError, match="with ConvStem, a normaliser and 1000 classes; requested: add_normalization=0"):
        check_description(weights, {"add_normalization": False}, source="x.pt")
    check_description(golden(BASE), {"add_normalization": True}, source="x.pt")  # the network fits both


def test_what_was_asked_for_passes():
    asked = {
        "arch": "convnext_base",
        "not_original": True,
        "updated": False,
        "num_classes": 1000,
        "add_normalization": None,
    }
    assert check_description(golden(BASE), asked, source="x.pt").candidates == ("convnext_base",)
    assert check_description(golden(BASE), {}, source="x.pt").arch == "convnext_base"


def test_errors_name_the_nearest():
    network = dict(golden(BASE).network)
    del network["head.fc.bias"]
    expected = "The nearest is convnext_base with ConvStem, but head.fc.bias is missing. "
    for asked in ({}, {"arch": "convnext_base"}):
        with pytest.raises(UserError, match=expected):
            check_description(Weights(network, None), asked, source="x.pt")
    with pytest.raises(UserError, match="The nearest is vit_s .*more"):
        check_description(Weights(network, None), {"arch": "vit_s"}, source="x.pt")


def test_unknown_architecture():
    with pytest.raises(UserError, match="^arch: .*'convnext_mikro'.*convnext_micro"):
        check_description(golden(BASE), {"arch": "convnext_mikro"}, source="x.pt")


@pytest.mark.parametrize(
    ("arch", "answer"),
    [
        ("timm_resnet18", "fits timm_resnet18 and timm_resnetblur18, which have the same weights"),
        ("timm_convnext_atto", None),
        ("timm_nest_tiny", "give arch timm_<name>"),
    ],
)
def test_other_models_of_timm_are_named(tmp_path, arch, answer, monkeypatch):
    """Or found, where they are of a family that robust networks come from; NesT cannot be built without numbers."""
    few = {"resnet": ["resnet18", "resnet26", "resnetblur18"], "convnext": ["convnext_atto", "convnext_femto"]}
    monkeypatch.setattr("timm.list_models", lambda module: few[module])
    source, path = normalize_model(get_new_model(arch, num_classes=4)), tmp_path / "w.pt"
    torch.save(source.state_dict(), path)
    trained = load_trained(path, NetworkDescription(arch=arch))
    assert (trained.description["arch"], trained.description["num_classes"]) == (arch, 4)
    assert trained.description["add_normalization"]
    with pytest.raises(UserError, match=answer) if answer else contextlib.nullcontext():
        assert load_trained(path, NetworkDescription()).description == trained.description
    with pytest.raises(UserError, match="it is timm_.* and 4 classes; requested: num_classes=5"):
        load_trained(path, NetworkDescription(arch=arch, num_classes=5))


def test_known_network_under_its_timm_name():
    weights = parse_weights(state("convnext_tiny"), source="x")
    assert check_description(weights, {"arch": "timm_convnext_tiny"}, source="x").arch == "timm_convnext_tiny"


def test_vit_of_another_resolution(tmp_path):
    """A file alone, trained at 48 pixels, evaluates at 32 as the network it was."""
    torch.manual_seed(0)
    source = get_new_model("vit_micro", num_classes=4, img_size=48).eval()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = load_trained(tmp_path / "w.pt", NetworkDescription()).model
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=1e-6)


def test_a_head_that_cannot_be_chosen_has_the_classes_of_imagenet():
    arch = "robustbench_Salman2020Do_R18"
    weights = parse_weights(build_model(arch).state_dict(), source="x")
    assert check_description(weights, {"arch": arch, "num_classes": 1000}, source="x").num_classes == 1000
    with pytest.raises(UserError, match="and 1000 classes; requested: num_classes=10 "):
        check_description(weights, {"arch": arch, "num_classes": 10}, source="x")


def test_a_normaliser_inside_of_robustbenchs_network():
    """RaWRN's is a module of the network itself."""
    with torch.device("meta"), _NumbersOnCPU():
        state = robustbench_entry("Peng2023Robust")["model"]().state_dict()
    assert list(state)[-2:] == ["normalization.mean", "normalization.std"]
    state |= {name: torch.rand(3) + 0.1 for name in ("normalization.mean", "normalization.std")}
    found = check_description(parse_weights(state, source="x"), {"arch": "robustbench_Peng2023Robust"}, source="x")
    assert found.add_normalization
    with torch.device("meta"), _NumbersOnCPU():
        assert has_normalizer(build_model("robustbench_Peng2023Robust"))
