"""Benchmark of the training step: the baseline does the same work, and the figures are correct."""

from __future__ import annotations

import json

import pytest
import torch

from attacks.apgd import apgd
from benchmarks.harness import Sample, main, row, run_program
from benchmarks.published_step import PublishedTraining, published_apgd
from benchmarks.train_step import Arm, Measured, Setup, measure, parse, rows
from common.errors import UserError
from common.processes import Processes
from tests.attacks.test_apgd import batch, micro


@pytest.mark.parametrize("n_iter", [1, 2, 8])
def test_published_attack_equals_this_implementation(n_iter):
    model, (x, y) = micro().double(), batch()
    x = x.double()
    expected = apgd(model, x, y, norm="Linf", eps=8 / 255, n_iter=n_iter).x_best
    model.train()
    found = published_apgd(model, x, y, eps=8 / 255, n_iter=n_iter)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.training


def test_published_step_trains():
    model, (x, y) = micro(), batch()
    published = PublishedTraining(model, arch="convnext_micro", eps=4 / 255, n_iter=2)
    for group in published.optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: value.clone() for name, value in published.model.state_dict().items()}
    published.step(x, y)
    changed = [name for name, value in published.model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2
    for name in changed:
        expected = 0.9999 * before[name] + 0.0001 * published.model.state_dict()[name]
        torch.testing.assert_close(published.average[name], expected)


def test_rows():
    setup = Setup("convnext_tiny", 8, 224, "fp32", 3, Processes.alone("cpu"))
    taken = {
        "published": [4.0, 5.0, 6.0],
        "eager_trim": [3.0, 4.0, 3.0],
        "eager_trim_reuse": [1.5, 3.0, 1.5],
        "eager_trim_clean": [1.0, 1.0, 1.5],
    }
    measured = Measured({kind: [Sample(s, 2 * s) for s in seconds] for kind, seconds in taken.items()}, {})
    flops = {"eager_trim": 6.0, "eager_trim_reuse": 5.0}
    part_ms = {"attack_forward": [1.0], "ema": [60.0]}
    arm = Arm("eager+trim")
    rest = {"prepared": 1.0, "suffix": "_batch16"}
    found = {r["name"]: r["figure"] for r in rows(setup, arm, measured, part_ms, flops, 10.0, **rest)}
    assert found["time_ratio_eager_trim_convnext_tiny_batch16"] == 0.75
    assert found["time_ratio_eager_trim_reuse_convnext_tiny_batch16"] == 0.375
    assert found["adv_over_clean_eager_trim_convnext_tiny_batch16"] == 3.0
    assert found["reuse_ratio_eager_trim_convnext_tiny_batch16"] == 0.5
    assert found["matmul_share_eager_trim_convnext_tiny_batch16"] == pytest.approx(0.2)
    assert found["matmul_share_eager_trim_reuse_convnext_tiny_batch16"] == pytest.approx(1 / 3)
    assert found["images_per_second_published_eager_trim_convnext_tiny_batch16"] == pytest.approx(8 / 5)
    assert found["images_per_second_eager_trim_convnext_tiny_batch16"] == pytest.approx(8 / 3)
    assert found["ms_ema_eager_trim_convnext_tiny_batch16"] == 60.0


def test_arms():
    compiled, trimmed = Arm("compiled").flags, Arm("max-autotune+trim").flags
    assert compiled == ["--training.compile=1", "--training.trim_last_block=0"]
    assert trimmed == ["--training.compile=max-autotune", "--training.trim_last_block=1"]
    with pytest.raises(UserError, match="--arms: .* got compild"):
        list(Arm("compild").flags)


def test_a_quick_run_measures_every_kind(tmp_path):
    arguments = parse(["--arch", "convnext_micro", "--quick", "--json", str(tmp_path / "step.json")])
    assert main(measure, arguments) == 0
    found = {r["name"]: r["figure"] for r in json.loads((tmp_path / "step.json").read_text())["rows"]}
    for arm in ("eager", "eager_trim"):
        for kind in (f"published_{arm}", arm, f"{arm}_reuse", f"{arm}_clean"):
            assert found[f"images_per_second_{kind}_convnext_micro"] > 0
        assert found[f"host_gap_{arm}_convnext_micro"] is None  # needs a GPU
        for part in ("transfer", "attack_forward", "attack_backward", "forward", "backward", "optimizer", "ema"):
            assert found[f"ms_{part}_{arm}_convnext_micro"] >= 0


def test_figures_are_written_as_they_come(tmp_path, capsys):
    def figures(arguments):
        yield [row("first", [1.0], "s")]
        raise UserError("the second cannot be measured")

    assert main(figures, parse(["--json", str(tmp_path / "step.json")])) == 2
    assert [r["name"] for r in json.loads((tmp_path / "step.json").read_text())["rows"]] == ["first"]
    assert "error: the second cannot be measured" in capsys.readouterr().err


def test_a_program_that_falls_back_to_uncompiled_training_is_rejected():
    warning = "warning: training.compile: training runs uncompiled: no C++ compiler"
    assert run_program(["-c", "print(1)"]) > 0
    with pytest.raises(UserError, match=r"uncompiled: no C\+\+ compiler"):
        run_program(["-c", f"import sys; print({warning!r}, file=sys.stderr)"])
