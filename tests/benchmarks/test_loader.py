"""Benchmark of the loader: its rows are correct. Speed is not tested."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from benchmarks.loader import cpu_rows, crop_differences, encoded_images, measure, parity_rows
from common.errors import UserError
from data.datasets import open_source
from tests.data import encoded


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(encoded(i, 120, 90, "JPEG"))
    (tmp_path / "a" / "broken.jpg").write_bytes(b"broken")
    return tmp_path


def test_all_rows_exist(photos):
    rows = {r["name"]: r for r in next(measure(argparse.Namespace(data=str(photos), quick=True, images=0, repeats=0)))}
    assert {
        "timm_heavy",
        "workers_part",
        "all_on_cpu",
        "device_part",
        "crop_parity",
        "crop_parity_p99",
        "memory",
    } <= set(rows)
    assert all(r["figure"] is None or r["figure"] >= 0 for r in rows.values())
    assert rows["crop_parity"]["ok"] and 0.05 < rows["memory"]["figure"] < 8


def test_ratios_are_taken_within_a_repetition():
    rows = {r["name"]: r for r in cpu_rows({"timm": [6, 60], "workers": [2, 10], "device": [1, 20]}, 12, counts=True)}
    assert rows["workers_part"]["spread"] == [3, 6] and rows["workers_part"]["ok"]
    assert rows["all_on_cpu"]["spread"] == [2, 2] and rows["timm_heavy"]["spread"] == [0.2, 2]


def test_parity_detects_a_difference(photos, monkeypatch):
    files = encoded_images(open_source(str(photos), split="train"), 6)
    assert len(files) == 6 and files[4] == files[0]  # the broken image is skipped
    assert crop_differences(files, 8).max() < 0.5
    monkeypatch.setattr("data.decoding.simplejpeg.decode_jpeg", lambda *_, **__: np.zeros((90, 120, 3), np.uint8))
    assert not parity_rows(crop_differences(files, 4))[0]["ok"]


def test_nothing_to_decode(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="--data: expected image files"):
        encoded_images(open_source(str(tmp_path), split="train"), 1)
