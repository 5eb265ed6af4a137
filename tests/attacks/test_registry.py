"""The attacks that training knows: flags, threat models, names."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks.registry import ATTACKS, Entry, build_attack
from training.config import AdvConfig, TrainingConfig
from training.optim import build_optimizer
from training.schedule import lr_at_epoch

X, Y = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])


def test_flags_of_the_attacks_exist_and_belong_to_the_attack_alone():
    known = {f.name for f in dataclasses.fields(AdvConfig)} - {"attack", "norm", "eps"}
    assert {flag for entry in ATTACKS.values() for flag in entry.flags} <= known


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, entry in ATTACKS.items() for norm in entry.norms])
def test_every_attack_is_what_training_calls(name, norm):
    model, adv = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), AdvConfig(attack=name, norm=norm)
    attack, eps = build_attack(adv), 0.05
    x = attack(model, X, Y, eps=eps, on_step=lambda *_: None)
    change = (x - X).flatten(1).norm(p={"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
    assert x.shape == X.shape and x.min() >= 0 and x.max() <= 1 and change.max() <= eps + 1e-5
    assert (change.max() > 0) == (name != "none")
    assert attack.evaluates_last == ATTACKS[name].evaluates_last


def test_an_attack_is_a_line(monkeypatch):
    monkeypatch.setitem(ATTACKS, "dark", Entry(lambda adv: lambda model, x, y, *, eps: (x - eps).clamp(min=0)))
    assert torch.equal(build_attack(AdvConfig(attack="dark"))(None, X, Y, eps=0.5), (X - 0.5).clamp(min=0))


def test_nothing_falls_through():
    """A name in the choices of a flag that no code knows is an error, not another training."""
    with pytest.raises(KeyError):
        build_attack(AdvConfig(attack="other"))
    with pytest.raises(KeyError):
        lr_at_epoch(1, lr=SimpleNamespace(lr_schedule_type="other"), epochs=2)
    with pytest.raises(ValueError, match="'other'"):
        build_optimizer(nn.Linear(1, 1), arch="vit_s", training=TrainingConfig(optimizer="other"))


def test_command_lines_do_without_pytorch():
    program = "import sys, training.config, training.identity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
