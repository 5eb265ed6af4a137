"""A trained network on other classes: a new head, and another learning rate for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
import training.build
import training.trainer
from tests.training.helpers import base_flags, run
from utils_architecture import get_new_model, normalize_model
from zoo.description import NetworkDescription
from zoo.runs import load_trained

PROJECT = Path(training.trainer.__file__).resolve().parent.parent
# One step of plain gradient descent, whose learning rate is the same from the first step on.
ONE_STEP = {"training.batch_size": 24, "training.optimizer": "sgd", "training.momentum": 0}
ONE_STEP |= {"lr.lr_schedule_type": "step", "training.weight_decay": 0, "training.precision": "fp64"}
APGD = {"adv.attack": "apgd", "adv.eps": "8/255"}


@pytest.fixture
def source(tmp_path):
    """Writes the weights of a network for seven classes; returns their file and the state dict."""

    def write(arch: str, *, normalized: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        model = get_new_model(arch, num_classes=7)
        state = (normalize_model(model) if normalized else model).state_dict()
        torch.save(state, path := tmp_path / "seven.pt")
        return path, state

    return write


@pytest.mark.parametrize(
    ("arch", "normalized", "head"),
    [
        ("convnext_micro", True, {"model.head.fc.weight", "model.head.fc.bias"}),
        ("convnext_iso_micro", False, {"head.weight", "head.bias"}),
        ("vit_micro", False, {"head.weight", "head.bias"}),
        ("timm_resnet10t", False, {"fc.weight", "fc.bias"}),
    ],
)
def test_a_new_head_on_the_old_body(images, tmp_path, source, arch, normalized, head, capsys):
    path, before = source(arch, normalized=normalized)
    flags = base_flags(images, tmp_path) | ONE_STEP | APGD | {"lr.body_factor": 0, "training.precision": "fp32"}
    flags |= {"model.arch": arch, "model.add_normalization": int(normalized)}
    fresh = run(flags | {"lr.lr": 1e-30}).weights
    assert run(flags | {"model.ckpt_path": path}).status == 2
    assert "--model.new_head=1 starts with a new head." in capsys.readouterr().err
    flags |= {"model.ckpt_path": path, "model.new_head": 1}
    untrained, outcome = run(flags | {"lr.lr": 1e-30}).weights, run(flags)
    for name, value in outcome.weights.items():  # statistics of batch normalisation too
        if name in head:
            assert torch.allclose(untrained[name], fresh[name]) and not torch.equal(value, fresh[name])
        else:
            assert torch.equal(value, before[name]), name
    assert outcome.params["provenance"]["trained_parameters"] == sum(fresh[name].numel() for name in head)
    # The attack goes through the frozen body.
    assert not torch.equal(run(flags | {"adv.attack": "none"}).weights[min(head)], outcome.weights[min(head)])
    # An evaluation finds the network by itself.
    trained = load_trained(outcome.folder, NetworkDescription())
    assert trained.description["num_classes"] == 4
    assert all(torch.equal(value, outcome.weights[name]) for name, value in trained.model.state_dict().items())


def test_no_gradient_of_a_frozen_body_is_kept_and_it_stays_in_eval_mode(images, tmp_path, monkeypatch):
    seen, original = [], training.step.optimizer_step

    def look(state, **kwargs):
        held = {name for name, p in state.model.named_parameters() if p.grad is not None}
        normalizing = {m.training for m in state.model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        seen.append((held, normalizing, len(state.optimizer.param_groups), len(state.statistics)))
        return original(state, **kwargs)

    monkeypatch.setattr(training.step, "optimizer_step", look)
    run(base_flags(images, tmp_path) | APGD | {"model.arch": "timm_resnet10t", "lr.body_factor": 0})
    assert seen == [({"fc.weight", "fc.bias"}, {False}, 2, 0)] * 3


@pytest.mark.parametrize("accum", [1, 3])
def test_body_factor_scales_the_bodys_learning_rate(images, tmp_path, accum):
    flags = base_flags(images, tmp_path) | ONE_STEP
    flags |= {"training.batch_size": 24 // accum, "training.grad_accum": accum}
    start, whole, half = (
        run(flags | more).weights for more in ({"lr.lr": 1e-30}, {}, {"lr.body_factor": 0.5, "lr.lr": 1e-3})
    )
    for name, value in start.items():
        factor = 1.0 if name.startswith("head.fc.") else 0.5
        assert torch.allclose(half[name] - value, factor * (whole[name] - value), rtol=1e-6, atol=1e-12), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model.new_head": 1}, "model.new_head: expected weights"),
        ({"lr.body_factor": 0, "model.freeze_some": 1}, "lr.body_factor: 0 freezes all but the head"),
        ({"lr.body_factor": -1}, "lr.body_factor: expected a number or a fraction"),
    ],
)
def test_what_does_not_go_together(images, tmp_path, capsys, flags, message):
    assert run(base_flags(images, tmp_path / "runs") | flags).status == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_weights_that_differ_in_more_than_the_head_are_refused(images, tmp_path, source, capsys):
    path, state = source("convnext_micro")
    del state["stem.0.bias"]
    torch.save(state, path)
    flags = base_flags(images, tmp_path / "runs") | {"model.ckpt_path": path}
    for new_head in (0, 1):
        assert run(flags | {"model.new_head": new_head}).status == 2
        error = capsys.readouterr().err
        assert "stem.0.bias is missing" in error and "--model.new_head=1" not in error


def test_published_robust_weights_in_one_command(images, tmp_path, monkeypatch):
    """configs/own_finetune.yaml, with a small network in place of the download."""
    asked = []
    own = ["--config-file", str(PROJECT / "configs/own_finetune.yaml"), f"--logging.folder={tmp_path / 'runs'}"]
    own += [f"--data.train_dataset={images}", f"--data.val_dataset={images}", "--model.num_classes=4"]
    own += ["--training.batch_size=8"]
    assert train.main(["--check", *own]) == 0
    small = {"model.arch": "convnext_micro", "resolution.min_res": 32, "resolution.max_res": 32}
    small |= {"validation.resolution": 32, "training.epochs": 3, "data.num_workers": 0}
    original = training.build.locate
    monkeypatch.setattr(
        training.build,
        "locate",
        lambda name, *, kind: asked.append((name, kind)) or original(str(tmp_path / "robust.pt")),
    )
    torch.save(get_new_model("convnext_micro", not_original=True).state_dict(), tmp_path / "robust.pt")
    assert train.main([*own, *(f"--{name}={value}" for name, value in small.items())]) == 0
    assert asked == [("convnext_tiny_cvst", "robust")]
