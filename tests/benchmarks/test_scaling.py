"""Predicted and measured throughput over processes."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling
from benchmarks.scaling import Cluster, all_reduce_seconds, predict, read_measured
from common.errors import UserError
from zoo.published import PUBLISHED

CLUSTER = Cluster(matmul=1e15, gpus_per_node=8, node_bandwidth=100e9, network_bandwidth=10e9)


def test_all_reduce_moves_the_gradients_almost_twice():
    assert all_reduce_seconds(25e6, 1, CLUSTER) == 0
    assert all_reduce_seconds(25e6, 8, CLUSTER) == pytest.approx(2 * 7 / 8 * 100e6 / 100e9)
    assert all_reduce_seconds(25e6, 16, CLUSTER) == pytest.approx(2 * 15 / 16 * 100e6 / 10e9)


def test_a_measured_speed_counts_and_only_what_is_not_hidden_slows_it_down():
    published = PUBLISHED["convnext_tiny_cvst"]
    p = predict(published, 8, CLUSTER, {"convnext_tiny": 800.0})
    assert p.waits == 0 and p.step == pytest.approx(0.1) and p.images_per_second == pytest.approx(8 * 800)
    assert p.epoch_hours == pytest.approx(1_281_167 / 6400 / 3600)
    fast = predict(published, 64, CLUSTER, {"convnext_tiny": 80_000.0})  # 1 ms of work, a quarter of which hides
    assert fast.waits == pytest.approx(fast.all_reduce - 0.00025) and fast.step == pytest.approx(0.001 + fast.waits)


def test_an_assumed_step_has_eight_passes_at_the_assumed_share():
    published = PUBLISHED["vit_b_cvst"]
    expected = 80 * 8 * 2 * published.gflops * 1e9 / (0.38 * 1e15)
    assert scaling.step_seconds(published, CLUSTER, {}) == pytest.approx(expected)


def test_the_document_tells_measured_from_assumed_and_has_every_run():
    text = scaling.document(CLUSTER, {"vit_s": 3000.0}, "a GPU")
    lines = {p.title: next(line for line in text.splitlines() if f"[{p.title}]" in line) for p in PUBLISHED.values()}
    assert "measured on a GPU" in text
    assert "assumed" not in lines["ViT-S-CvSt"] and "assumed" in lines["ViT-B-CvSt"]
    committed = scaling.DOCUMENT.read_text()
    assert all(f"[{title}]" in committed for title in lines)


def test_measured_rates_are_read_or_refused(tmp_path, capsys):
    file = tmp_path / "rates.json"
    rows = [
        {"name": "images_per_second_ours_vit_s", "figure": 3.0, "note": "batch 80, 224 px, fp16, compiled; 1 s"},
        {"name": "images_per_second_ours_vit_b", "figure": None, "note": ""},
    ]
    file.write_text(json.dumps({"device": "a GPU", "rows": [*rows, {"name": "other", "figure": 1.0}]}))
    assert read_measured(file) == ({"vit_s": 3.0}, "a GPU")
    file.write_text(file.read_text().replace("batch 80", "batch 8"))
    with pytest.raises(UserError, match="expected steps of batch 80, 224 px, got batch 8, 224 px"):
        read_measured(file)
    file.write_text("[]")
    with pytest.raises(UserError, match="images_per_second_ours_<arch>"):
        read_measured(file)
    assert scaling._run(["predict", "--measured", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
