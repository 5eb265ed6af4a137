"""Numbers about the use of the device, and the profile of steps."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from torch import nn

from common.processes import Processes
from tests.training.helpers import base_flags, run
from tests.training.test_step import config_for
from training.build import build_state
from training.efficiency import Efficiency, forward_flops, peak_flops
from utils_architecture import get_new_model


def test_flops_of_a_known_network():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert forward_flops(network, 8) == 2 * (16 * 8 * 27 + 8 * 16 * 5)
    assert all(module.training for module in network.modules())
    assert forward_flops(network, 9) is None  # the head does not fit


def test_flops_of_attention_are_counted():
    vit = get_new_model("vit_s", pretrained=False, not_original=False, updated=False).eval()
    blocks, dim, tokens = 12, 384, 197
    block = 2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim
    expected = blocks * block + 2 * 196 * 768 * dim + 2 * dim * 1000
    assert forward_flops(vit, 224) == pytest.approx(expected, rel=1e-6)


def test_rate_includes_the_attack():
    config, processes = config_for(**{"model.arch": "convnext_micro", "adv.n_iter": 2}), Processes.alone("cpu")
    state = build_state(config, processes)
    flops = forward_flops(state.model, 32)
    numbers = Efficiency(config, state, processes).numbers(1e6, size=32)
    assert numbers == {"tflop_per_second": pytest.approx(8 * flops * 1e6 / 1e12, abs=1e-4)}
    state.reuses_forward = True
    numbers = Efficiency(config, state, Processes(0, 2, torch.device("cpu"))).numbers(1e6, size=32)
    assert numbers == {"tflop_per_second": pytest.approx(7 * flops * 5e5 / 1e12, abs=1e-4)}
    next(state.model.parameters()).requires_grad_(False)
    assert Efficiency(config, state, processes).numbers(1e6, size=32) == {}


def test_share_of_the_peak_rate(monkeypatch):
    config, processes = (
        config_for(**{"model.arch": "convnext_micro", "training.precision": "bf16"}),
        Processes.alone("cpu"),
    )
    state = build_state(config, processes)
    monkeypatch.setattr("training.efficiency.name_of", lambda device: "NVIDIA H100 80GB HBM3")
    numbers = Efficiency(config, state, processes).numbers(1e8, size=32)
    assert numbers["mfu"] == pytest.approx(numbers["tflop_per_second"] / 989, rel=0.01) and numbers["mfu"] > 0.01


@pytest.mark.parametrize(
    "name, precision, expected",
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA A100-SXM4-80GB", "fp64", None),
        ("NVIDIA GeForce GTX 1080", "fp16", None),
        ("", "fp32", None),
    ],
)
def test_peak_rates(name, precision, expected):
    assert peak_flops(name, precision) == expected


def test_a_run_profiles_steady_steps(images, tmp_path, capsys):
    flags = base_flags(images, tmp_path) | {"training.epochs": 3, "adv.attack": "apgd", "adv.eps": "8/255"}
    outcome = run(flags | {"training.profile_steps": 2})
    plain = run(flags | {"logging.addendum": "plain"})
    assert outcome.steps == plain.steps and outcome.epochs[0]["tflop_per_second"] > 0
    folder = outcome.folder / "profile"
    assert f"profile: {folder}" in capsys.readouterr().out
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    for region in ("augmentation", "attack", "forward", "backward", "optimizer"):
        found = [event for event in events if event.get("name") == region and event.get("cat") == "user_annotation"]
        assert len(found) == 2, region
    assert "aten::convolution" in (folder / "operators.txt").read_text()
    assert not (plain.folder / "profile").exists()


def test_a_run_that_is_too_short_has_no_profile(images, tmp_path, capsys):
    outcome = run(base_flags(images, tmp_path) | {"training.profile_steps": 3})
    assert outcome.status == 0 and not (outcome.folder / "profile").exists()
    assert "training.profile_steps: the run ended before its step 5" in capsys.readouterr().err


def test_a_profile_that_cannot_be_written_does_not_end_the_run(images, tmp_path, capsys, monkeypatch):
    def fail(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", fail)
    outcome = run(base_flags(images, tmp_path) | {"training.epochs": 2, "training.profile_steps": 1})
    assert outcome.status == 0 and len(outcome.steps) == 6
    assert "the profile cannot be written (No space left on device)" in capsys.readouterr().err
