"""Figures of docs/ against the files that they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest

from common.provenance import PROJECT

STEP = "2026-11-30-cpu-{}"


def row(file: str, name: str) -> dict:
    content = json.loads((PROJECT / "benchmarks" / "results" / f"{file}.json").read_text())
    (found,) = [entry for entry in content["rows"] if entry["name"] == name]
    return found


def with_spread(entry: dict, digits: int) -> str:
    low, high = entry["spread"]
    return f"{entry['figure']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@pytest.mark.parametrize("title, arch", [("ConvNeXt-T", "convnext_tiny"), ("ViT-S", "vit_s")])
def test_step_times_are_those_measured(title: str, arch: str) -> None:
    def figure(name: str) -> dict:
        return row(STEP.format(arch), f"{name}_{arch}")

    time, reuse, matmul = (
        figure(name)
        for name in ("time_ratio_eager_trim_reuse", "reuse_ratio_eager_trim", "matmul_share_eager_trim_reuse")
    )
    clean, own = (figure(f"images_per_second_eager_trim_{kind}")["figure"] for kind in ("clean", "reuse"))
    cells = [
        title,
        with_spread(time, 2),
        f"{reuse['figure']:.2f}",
        f"{clean / own:.1f}",
        f"{100 * matmul['figure']:.0f} %",
    ]
    page = (PROJECT / "docs" / "performance.md").read_text()
    assert f"| {' | '.join(cells)} |" in page
    compiled = row(f"2026-11-27-cpu-compiled-{arch}", f"time_ratio_{arch}")
    assert f"{compiled['figure']:.2f} ({title})" in page


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


NETWORKS = {"ViT-S": "vit_s", "ConvNeXt-T": "convnext_tiny", "ViT-B": "vit_b", "ConvNeXt-B": "convnext_base"}


def predicted(name: str, arch: str, gpu: str, mode: str = "compiled") -> dict:
    return row("roofline", f"{name}_{arch}_{gpu}_{mode}")


def span(values: list[float], digits: int = 0) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize("title", NETWORKS)
def test_predicted_figures_of_a_network(title: str, gpu: str) -> None:
    arch = NETWORKS[title]
    eager, compiled = (predicted("images_per_second", arch, gpu, mode)["figure"] for mode in ("eager", "compiled"))
    share = predicted("matmul_share", arch, gpu)["figure"]
    parts = (predicted(f"ms_{part}", arch, gpu)["figure"] for part in ("attack", "training", "update"))
    ms = " + ".join(f"{part:.1f}" for part in parts)
    line = f"| {title} | {gpu.upper()} | {eager:.0f} | {compiled:.0f} | {100 * share:.0f} % | {ms} |"
    assert line in (PROJECT / "docs" / "performance.md").read_text()


def test_predicted_ranges() -> None:
    page = " ".join((PROJECT / "docs" / "performance.md").read_text().split())

    def figures(name: str, archs: Iterable[str] = tuple(NETWORKS.values()), mode: str = "compiled") -> list[float]:
        return [predicted(name, arch, gpu, mode)["figure"] for arch in archs for gpu in ("h100", "h200")]

    vits, convnexts = ("vit_s", "vit_b"), ("convnext_tiny", "convnext_base")
    assert f"still {span([100 * share for share in figures('memory_share')])} % of a compiled step" in page
    assert (
        f"are {span([100 * share for share in figures('depthwise_share', convnexts)])} % of a compiled ConvNeXt" in page
    )
    both = zip(figures("images_per_second"), figures("images_per_second", mode="eager"))
    assert f"Compilation pays most, {span([compiled / eager for compiled, eager in both], 1)} times" in page
    assert f"shortens a compiled step to {span(figures('reuse_ratio'), 2)} of its time" in page
    assert f"`training.trim_last_block` to {span(figures('trim_ratio', vits), 2)} for a ViT**" in page
    assert span(figures("trim_ratio", convnexts), 2) == "0.99 to 0.99" and "only to 0.99 for a ConvNeXt" in page
    parts = zip(*(figures(f"ms_{part}") for part in ("update", "attack", "training")))
    whole = [(update, update + attack + training) for update, attack, training in parts]
    assert f"take {span([100 * update / ms for update, ms in whole])} %." in page
    notes = [
        predicted("images_per_second", arch, gpu)["note"] for arch in NETWORKS.values() for gpu in ("h100", "h200")
    ]
    host = [float(note.split()[2]) for note in notes]
    assert f"the host needs {span(host)} ms" in page and all(ms < device for ms, (_, device) in zip(host, whole))
    for title, arch in (("ViT-S", "vit_s"), ("ConvNeXt-T", "convnext_tiny")):
        ratio = with_spread(row("roofline_cpu", f"predicted_over_measured_{arch}"), 2)
        assert f"{title} {ratio}" in page


def test_readme_counts_the_claims_of_the_evidence() -> None:
    verdicts = [claim["verdict"] for claim in json.loads((PROJECT / "docs" / "evidence.json").read_text())["claims"]]
    measured = [verdict for verdict in verdicts if verdict != "not run"]
    assert (len(measured), measured.count("agrees"), measured.count("does not agree")) == (13, 0, 2)
    assert "of 13 measured differences two are significant, and both disagree" in (PROJECT / "README.md").read_text()
