"""Figures of docs/ against the files that they come from."""

from __future__ import annotations

import json

import pytest

from common.provenance import PROJECT

STEP = "2026-11-27-cpu-{}"


def row(file: str, name: str) -> dict:
    content = json.loads((PROJECT / "benchmarks" / "results" / f"{file}.json").read_text())
    (found,) = [entry for entry in content["rows"] if entry["name"] == name]
    return found


def with_spread(entry: dict, digits: int) -> str:
    low, high = entry["spread"]
    return f"{entry['figure']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@pytest.mark.parametrize("title, arch", [("ConvNeXt-T", "convnext_tiny"), ("ViT-S", "vit_s")])
def test_step_times_are_those_measured(title: str, arch: str) -> None:
    time, clean, matmul = (
        row(STEP.format(arch), f"{name}_{arch}") for name in ("time_ratio", "adv_over_clean", "matmul_share")
    )
    line = f"| {title} | {with_spread(time, 2)} | {clean['figure']:.1f} | {100 * matmul['figure']:.0f} % |"
    page = (PROJECT / "docs" / "performance.md").read_text()
    assert line in page
    assert f"{row(STEP.format(arch), f'reuse_ratio_{arch}')['figure']:.2f} of its time for both" in page
    compiled = row(STEP.format(f"compiled-{arch}"), f"time_ratio_{arch}")
    assert f"{compiled['figure']:.2f}\n({title})" in page or f"{compiled['figure']:.2f} ({title})" in page


def test_figures_of_loader_and_autoattack_are_those_measured() -> None:
    page = (PROJECT / "docs" / "performance.md").read_text()
    loader = {name: row("loader_cpu", name) for name in ("timm_heavy", "workers", "workers_part", "all_on_cpu")}
    assert f"| `data.pipeline=timm` | {loader['timm_heavy']['figure']:.0f} images/s" in page
    assert f"{loader['workers']['figure']:.0f} images/s and core: " in page
    assert all(
        with_spread(loader[name], 1).replace(" (", " times `timm` (") in page for name in ("workers_part", "all_on_cpu")
    )
    assert f"{row('loader_cpu', 'crop_parity')['figure']:.3f} grey levels" in page
    assert f"{row('loader_cpu', 'memory')['figure']:.1f} GiB" in page
    flowing = " ".join(page.split())
    assert f"One worker takes {with_spread(row('autoattack_cpu', 'one_worker'), 2)}" in flowing
    assert f"Two workers take {with_spread(row('autoattack_cpu', 'two_workers'), 2)}" in flowing
    assert f"{100 * row('autoattack_cpu', 'overhead')['figure']:.1f} % of a worker's time" in flowing


def test_readme_counts_the_claims_of_the_evidence() -> None:
    verdicts = [claim["verdict"] for claim in json.loads((PROJECT / "docs" / "evidence.json").read_text())["claims"]]
    measured = [verdict for verdict in verdicts if verdict != "not run"]
    assert (len(measured), measured.count("agrees"), measured.count("does not agree")) == (13, 0, 2)
    assert "of 13 measured differences two are significant, and both disagree" in (PROJECT / "README.md").read_text()
