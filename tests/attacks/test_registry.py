"""The attacks that training can select: flags, threat models, names."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks.registry import ATTACKS, AttackEntry, build_attack, forward_equivalents
from training.config import AdvConfig, LRConfig, TrainingConfig
from training.optim import build_optimizer
from training.schedule import SCHEDULES, lr_at_epoch

X, Y = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


class Reads:
    """Flags that record which of them are read."""

    def __init__(self, flags):
        self._flags, self.read = flags, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self._flags, name)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_entry_names_the_flags_that_its_attack_reads(name):
    """A forgotten flag would count as idle, and two different trainings would share a folder."""
    adv = Reads(AdvConfig(attack=name))
    build_attack(adv)(MODEL, X, Y, eps=0.05)
    assert adv.read - {"attack", "norm"} == set(ATTACKS[name].flags)
    assert adv.read <= {f.name for f in dataclasses.fields(AdvConfig)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_entry_names_the_flags_that_its_schedule_reads(name):
    lr = Reads(LRConfig(lr_schedule_type=name))
    for epoch in range(101):
        lr_at_epoch(epoch, lr=lr, epochs=100)
    assert lr.read - {"lr", "lr_schedule_type"} == set(SCHEDULES[name].flags)


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, entry in ATTACKS.items() for norm in entry.norms])
def test_every_attack_is_what_training_calls(name, norm):
    attack, eps, steps, last = build_attack(AdvConfig(attack=name, norm=norm)), 0.05, [], []

    def evaluate_last(x):
        last.append(x)
        return MODEL(x)

    x = attack(MODEL, X, Y, eps=eps, on_step=lambda *step: steps.append(step), evaluate_last=evaluate_last)
    change = (x - X).flatten(1).norm(p={"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
    assert x.shape == X.shape and x.min() >= 0 and x.max() <= 1 and change.max() <= eps + 1e-5
    assert (change.max() > 0) == (name != "none")
    assert (bool(steps), len(last)) == (ATTACKS[name].reports_steps, int(ATTACKS[name].evaluates_last))


@pytest.mark.parametrize("name", ATTACKS)
def test_passes_are_those_that_the_attack_runs(name):
    forwards, gradients = [], []

    def model(x):
        forwards.append(len(x))
        if x.requires_grad:
            x.register_hook(lambda grad: gradients.append(len(grad)))
        return MODEL(x)

    adv = AdvConfig(attack=name, n_iter=3)
    build_attack(adv)(model, X, Y, eps=0.05)
    assert ATTACKS[name].passes(adv) == (len(forwards), len(gradients))
    assert forward_equivalents(adv) == len(forwards) + len(gradients) + 3
    assert forward_equivalents(adv, reused=True) == len(forwards) + len(gradients) + 2


def test_an_attack_is_a_line(monkeypatch):
    monkeypatch.setitem(ATTACKS, "dark", AttackEntry(lambda adv: lambda model, x, y, *, eps: (x - eps).clamp(min=0)))
    assert torch.equal(build_attack(AdvConfig(attack="dark"))(None, X, Y, eps=0.5), (X - 0.5).clamp(min=0))


def test_nothing_falls_through():
    """A name in a flag's choices that no code handles is an error, not another training."""
    with pytest.raises(KeyError):
        build_attack(AdvConfig(attack="other"))
    with pytest.raises(KeyError):
        lr_at_epoch(1, lr=SimpleNamespace(lr_schedule_type="other"), epochs=2)
    with pytest.raises(ValueError, match="'other'"):
        build_optimizer(nn.Linear(1, 1), arch="vit_s", training=TrainingConfig(optimizer="other"))


def test_command_lines_do_without_pytorch():
    program = "import sys, training.config, training.identity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
