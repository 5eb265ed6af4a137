"""Strict loading: every layout fits or is refused by name, never partly."""

from __future__ import annotations

import pickle

import pytest
import safetensors.torch
import torch

from common.config import EvalModelConfig
from common.errors import UserError
from utils_architecture import get_new_model, normalize_model
from zoo.loading import load_weights, read_weights
from zoo.runs import load_trained

FLAG = "model.ckpt_path"


def micro(seed=0, num_classes=4, not_original=True, arch="convnext_micro"):
    torch.manual_seed(seed)
    return get_new_model(arch, not_original=not_original, num_classes=num_classes)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


LAYOUTS = {
    "plain": lambda s: s,
    "module": lambda s: prefixed(s, "module."),
    "base_model": lambda s: prefixed(s, "base_model."),
    "both": lambda s: prefixed(s, "module.base_model."),
    "compiled": lambda s: prefixed(s, "module._orig_mod."),
    "model": lambda s: prefixed(s, "model."),
    "full state": lambda s: {"model": prefixed(s, "module."), "step": 3, "optimizer": {"lr": 0.1}},
    "state_dict": lambda s: {"state_dict": s, "epoch": 7},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalized", [False, True])
def test_round_trip(tmp_path, layout, normalized):
    source = normalize_model(micro(1)) if normalized else micro(1)
    target = normalize_model(micro(2)) if normalized else micro(2)
    path = tmp_path / "w.pt"
    torch.save(LAYOUTS[layout](source.state_dict()), path)
    load_weights(target, read_weights(path, flag=FLAG), flag=FLAG, source=path)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    source, target = micro(1), micro(2)
    safetensors.torch.save_file(source.state_dict(), path)
    load_weights(target, read_weights(path, flag=FLAG), flag=FLAG, source=path)
    assert torch.equal(target.head.fc.weight, source.head.fc.weight)


def test_weights_without_normaliser_fit_a_model_with_one(tmp_path):
    path, source, target = tmp_path / "w.pt", micro(1), normalize_model(micro(2))
    torch.save(source.state_dict(), path)
    load_weights(target, read_weights(path, flag=FLAG), flag=FLAG, source=path)
    assert torch.equal(target.model.head.fc.weight, source.head.fc.weight)


def refused(path, target):
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(target, read_weights(path, flag=FLAG), flag=FLAG, source=path)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert FLAG in str(error.value)
    return str(error.value)


def test_other_stem_lists_names(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(micro(not_original=False).state_dict(), path)
    message = refused(path, micro())
    assert "stem.stem.0.weight is missing" in message and "model.not_original" in message


def test_other_classes(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(micro(num_classes=10).state_dict(), path)
    assert "head.fc.weight is [10, 112] instead of [4, 112]" in refused(path, micro())


def test_missing_and_unexpected_names(tmp_path):
    path, state = tmp_path / "w.pt", micro().state_dict()
    del state["head.fc.bias"]
    state["surplus"] = torch.zeros(1)
    torch.save(state, path)
    message = refused(path, micro())
    assert "head.fc.bias is missing" in message and "surplus is unexpected" in message


def test_normaliser_needs_one(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(normalize_model(micro()).state_dict(), path)
    assert "model.add_normalization=1" in refused(path, micro())


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "text", "empty", "truncated", "pickle", "numbers", "bad safetensors"]
)
def test_unreadable_files(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("w.safetensors" if kind == "bad safetensors" else "w.pt")
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("<html>")
    elif kind in ("empty", "bad safetensors"):
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save(micro().state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "numbers":
        torch.save({"a": 1, "b": [2]}, path)
    assert str(path) in refused(path, micro())
    assert not (tmp_path / "evil").exists()


def test_description_comes_from_the_run(images, tmp_path):
    from tests.training.helpers import base_flags, run

    outcome = run(base_flags(images, tmp_path) | {"model.not_original": 1, "model.add_normalization": 1})
    trained = load_trained(outcome.folder, EvalModelConfig(), flag="eval.model_in")
    assert trained.description["arch"] == "convnext_micro" and trained.description["not_original"] is True
    assert trained.description["num_classes"] == 4 and not trained.model.training
    assert torch.equal(trained.model.state_dict()["normalize.mean"], outcome.weights["normalize.mean"])
    with pytest.raises(UserError, match="eval.model_in.*model.not_original"):
        load_trained(outcome.folder, EvalModelConfig(not_original=False), flag="eval.model_in")
    with pytest.raises(UserError, match="weights_<epoch>"):
        load_trained(tmp_path, EvalModelConfig(), flag="eval.model_in")


def test_bare_file_needs_the_flags(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(normalize_model(micro()).state_dict(), path)
    asked = EvalModelConfig(arch="convnext_micro", not_original=True, num_classes=4)
    trained = load_trained(path, asked, flag="eval.model_in")
    assert trained.description["add_normalization"] is True  # found in the file
    with pytest.raises(UserError, match="does not fit"):
        load_trained(path, EvalModelConfig(arch="convnext_micro", num_classes=4), flag="eval.model_in")
