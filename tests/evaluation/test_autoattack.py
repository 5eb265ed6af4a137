"""Our loop around AutoAttack's attacks against the package's own evaluation, and the runner's report."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types

import pytest
import torch
from torch import nn

import evaluation.autoattack
import runner_aa_eval
from common.config import DEFAULT_EPS, EvalConfig, EvalModelConfig, load_config
from common.errors import UserError
from evaluation.autoattack import ATTACKS, attack_chunk, package_name, standard_autoattack
from evaluation.evaluate import load_images
from evaluation.report import markdown_table, show_eps, summarise
from tests.training.helpers import base_flags, run
from zoo.runs import load_trained

CPU = torch.device("cpu")
EPS = {"Linf": 0.01, "L2": 0.1, "L1": 0.4}


class Net(nn.Module):
    """A small network that is neither robust nor hopeless at the radii above."""

    def __init__(self, num_classes=10):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Parameter(torch.randn(12, 3, 3, 3, generator=generator) * 0.3)
        self.head = nn.Parameter(torch.randn(num_classes, 12 * 16, generator=generator) * 0.3)

    def forward(self, x):
        return torch.tanh(torch.nn.functional.conv2d(x, self.conv, stride=2, padding=1)).flatten(1) @ self.head.T


def case(n=12, num_classes=10):
    model = Net(num_classes).eval()
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % num_classes  # one misclassified image
    return model, x, y


def shorten(engine):
    """The same attacks with fewer iterations, to save time."""
    for attack in (engine.apgd, engine.apgd_targeted, engine.fab):
        attack.n_iter = 10
    engine.square.n_queries = 200
    return engine


@pytest.fixture
def short(monkeypatch):
    original = evaluation.autoattack.standard_autoattack
    monkeypatch.setattr(evaluation.autoattack, "standard_autoattack", lambda *a, **k: shorten(original(*a, **k)))


def test_engine_is_the_standard_version():
    model, x, y = case(2)
    engine = standard_autoattack(model, norm="Linf", eps=0.01, seed=0, device=CPU, num_classes=10)
    assert engine.attacks_to_run == list(ATTACKS) and engine.apgd.n_iter == engine.fab.n_iter == 100
    assert engine.apgd_targeted.n_target_classes == 9 and engine.square.n_queries == 5000
    assert engine.apgd.n_restarts == engine.apgd_targeted.n_restarts == engine.fab.n_restarts == 1


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("full", [False, True])
def test_equals_the_package_image_by_image(norm, full, short):
    model, x, y = case()
    verdicts = attack_chunk(model, x, y, norm=norm, eps=EPS[norm], seed=3, full=full, device=CPU)
    package = importlib.import_module(package_name())
    reference = shorten(package.AutoAttack(model, norm=norm, eps=EPS[norm], seed=3, device="cpu", version="standard"))
    reference.attacks_to_run = list(ATTACKS if full else ATTACKS[:2])
    x_adv, y_adv = reference.run_standard_evaluation(x, y, batch_size=len(x))
    assert torch.equal(verdicts.x_adv, x_adv)
    robust = torch.tensor([broken == "" for broken in verdicts.broken_by])
    assert torch.equal(robust, y_adv == y)
    assert verdicts.broken_by[0] == "clean" and verdicts.clean_pred[1:].equal(y[1:])
    assert 0 < robust.sum() < len(x) - 1  # neither all nor none: the comparison means something


def test_summary_counts(short):
    model, x, y = case()
    chunks = [
        attack_chunk(model, a, b, norm="Linf", eps=0.02, seed=0, full=True, device=CPU)
        for a, b in zip(x.split(5), y.split(5))
    ]
    summary = summarise(chunks, x, norm="Linf", eps=0.02, attacks=ATTACKS)
    x_adv = torch.cat([c.x_adv for c in chunks])
    with torch.no_grad():
        robust = (model(x_adv).argmax(1) == y).double().mean().item()
    assert summary["n"] == 12 and summary["clean_acc"] == pytest.approx(11 / 12)
    assert summary["robust_acc"] == pytest.approx(robust) == summary["acc_after"]["square"]
    after = list(summary["acc_after"].values())
    assert after == sorted(after, reverse=True)
    assert 0.01 < summary["max_perturbation"] <= 0.02 * (1 + 2e-5)
    assert 0 <= summary["pixel_range"][0] <= summary["pixel_range"][1] <= 1


def test_few_classes(short):
    model, x, y = case(4, num_classes=5)
    assert len(attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, full=False, device=CPU).broken_by) == 4
    model, x, y = case(4, num_classes=3)
    with pytest.raises(UserError, match="at least 4 classes"):
        attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, full=False, device=CPU)


def test_nan_logits_are_refused():
    _, x, y = case(2)
    with pytest.raises(UserError, match="not finite"):
        attack_chunk(nn.Sequential(Net(), Nan()), x, y, norm="Linf", eps=0.02, seed=0, full=False, device=CPU)


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_the_repositorys_package_serves_too(monkeypatch, short):
    """`autoattack` has the same attacks; its constructor takes `verbose` and prints unless told not to."""
    real = importlib.import_module("pyautoattack").AutoAttack
    quiet = []

    class AutoAttack(real):
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, device="cuda", version="standard"):
            quiet.append(not verbose)
            super().__init__(model, norm=norm, eps=eps, seed=seed, device=device, version=version)

    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack, __spec__=object()))
    model, x, y = case(4)
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.autoattack.package_name", lambda: "autoattack")
        ours = attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, full=False, device=CPU)
    same = attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, full=False, device=CPU)
    assert quiet == [True] and torch.equal(ours.x_adv, same.x_adv)


def test_no_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyautoattack"):
        package_name()


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    return run(base_flags(images, tmp_path_factory.mktemp("runs")) | {"training.epochs": 2, "model.not_original": 1})


def evaluate(trained, images, *flags):
    argv = [
        f"--eval.model_in={trained.folder}",
        f"--data.val_dataset={images}",
        "--data.num_workers=0",
        "--eval.fullaa=0",
    ]
    return runner_aa_eval.main([*argv, "--eval.img_size=32", "--eval.crop_pct=1", "--eval.batch_size=3", *flags])


def test_runner_writes_a_report_and_a_table(trained, images, tmp_path, capsys, short):
    out = tmp_path / "report"
    assert evaluate(trained, images, "--eval.norms=Linf,L2", f"--eval.out={out}", "--eval.n_ex=4") == 0
    report = json.loads((out / "report.json").read_text())
    assert [(r["norm"], r["eps"], r["n"]) for r in report["results"]] == [
        ("Linf", DEFAULT_EPS["Linf"], 4),
        ("L2", DEFAULT_EPS["L2"], 4),
    ]
    assert report["model"]["arch"] == "convnext_micro" and len(report["model"]["sha256"]) == 64
    assert report["eval"]["attacks"] == ["apgd-ce", "apgd-t"] and "pyautoattack" in report["eval"]["engine"]
    table = capsys.readouterr().out
    assert "| Linf | 4/255 | 4" in table and "apgd-t" in table
    assert evaluate(trained, images, f"--eval.out={out}", "--eval.n_ex=4") == 0
    assert json.loads((out / "report.json.1").read_text()) == report  # nothing is lost


def test_runner_takes_all_classes_and_default_folder(trained, images, short):
    assert evaluate(trained, images, "--eval.n_ex=4") == 0
    report = json.loads((trained.folder / "eval_weights_2" / "report.json").read_text())
    assert report["data"]["n"] == 4 and report["data"]["labels"] == {"0": 1, "1": 1, "2": 1, "3": 1}


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--eval.model_in=nowhere.pt"], "eval.model_in"),
        (["--data.val_dataset=nowhere"], "data.val_dataset"),
        (["--model.not_original=0"], "does not fit"),
        (["--eval.norms=L7"], "eval.norms"),
        (["--model.arch=convnext_mikro"], "convnext_micro"),
    ],
)
def test_runner_refuses(trained, images, flags, words, capsys):
    assert evaluate(trained, images, *flags) == 2
    assert words in capsys.readouterr().err


def test_table_and_eps():
    table = markdown_table([{"a": 1, "bb": "x"}, {"a": 22, "bb": "y"}])
    assert table.splitlines() == ["| a  | bb |", "|----|----|", "| 1  | x  |", "| 22 | y  |"]
    assert [show_eps(e) for e in (4 / 255, 0.1, 2.0, 75)] == ["4/255", "0.1", "2", "75"]


def test_labels_are_matched_by_class_name(trained, images, tmp_path, short):
    """A validation folder that lacks a class must not shift the labels of those after it."""
    shutil.copytree(images / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "blue")
    config = load_config(
        EvalConfig,
        [f"--eval.model_in={trained.folder}", f"--data.val_dataset={tmp_path / 'val'}", "--eval.img_size=32"],
    )
    network = load_trained(trained.folder, config.model, flag="eval.model_in")
    assert load_images(config, network).y.unique().tolist() == [1, 2, 3]
    shutil.copy(trained.folder / "weights_2.pt", tmp_path / "bare.pt")
    bare = load_trained(
        tmp_path / "bare.pt",
        EvalModelConfig(arch="convnext_micro", not_original=True, num_classes=4),
        flag="eval.model_in",
    )
    with pytest.raises(UserError, match="head has 4 classes, data.val_dataset has 3"):
        load_images(config, bare)
