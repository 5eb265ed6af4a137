"""Tables, files and verdicts for known results."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ablation.__main__ import main
from ablation.evidence import AGREES, CANNOT_TELL, DOES_NOT, NOT_RUN, verdict, write_evidence
from ablation.grid import load_grid
from ablation.results import Result, Training
from ablation.statistics import Difference, Value
from ablation.summary import Summary
from common.errors import UserError

TRAIN = {"data": {"train_dataset": "digits", "val_dataset": "digits", "num_workers": 0, "in_memory": 0}}
PROVENANCE = {
    "commit": "c" * 40 + "+changes",
    "python": "3.11",
    "versions": {"torch": "2"},
    "devices": ["a CPU"],
    "threads": 1,
}
N = 1000
SHARES = {"a": (0.30, 0.31, 0.32), "b": (0.50, 0.52, 0.53), "c": (0.30, 0.33, 0.30)}


def right(share: float) -> np.ndarray:
    return (np.arange(N) < round(share * N)).astype(float)


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    """Return a summary: b is far above a, c is not; d failed with one seed and did not run with others; e has one seed."""
    arms = {name: {} for name in "abcde"}
    path = tmp_path / "grid.yaml"
    evaluate = {"eval.norms": "Linf,L2", "eval.eps": "8/255,0.5"}
    path.write_text(yaml.safe_dump({"train": TRAIN, "arms": arms, "seeds": [0, 1, 2], "evaluate": evaluate}))
    grid = load_grid(path, out=tmp_path / "out")
    results, trainings = [], [Training("d", 0, 0.0, {})]
    for name, entry in grid.entries.items():
        for seed in grid.seeds:
            result = Result(entry, seed, "open")
            if name in SHARES or (name, seed) == ("e", 1):
                share = SHARES.get(name, (0, 0.9, 0))[seed]
                result = Result(entry, seed, "finished", metrics={"Linf 8/255": Value(share, N, right(share))})
                result.seconds, result.provenance = {"training": 90.0, "evaluation": 30.0}, [PROVENANCE]
                trainings.append(Training(name, seed, 90.0, PROVENANCE))
            results.append(result)
    failed = next(r for r in results if (r.entry.name, r.seed) == ("d", 0))
    failed.status, failed.notes = "failed", ["training: status 1: the disk is full"]
    return Summary(grid, results, trainings)


def row_of(table: str, first: str) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (found,) = [cells for cells in lines if cells[0] == first]
    return found


def test_tables(summary: Summary) -> None:
    table, differences = summary.results_table(), summary.comparisons_table()
    assert row_of(table, "a") == ["a", "3/3", "31.0 ± 1.0", "90", "30"]
    assert row_of(table, "e") == ["e", "1/3", "90.0 (1 seed)", "90", "30"]
    assert row_of(table, "d") == ["d", "0/3", "–", "–", "–"]
    mean, half = 20.6667, 4.30265 * 0.57735 / 3**0.5  # Student's t with two degrees of freedom
    assert row_of(differences, "b − a") == ["b − a", "3", f"+{mean:.1f} [+{mean - half:.1f}, +{mean + half:.1f}]"]
    assert row_of(differences, "e − a")[2].startswith("+59.0 {")
    assert row_of(differences, "d − a") == ["d − a", "0", "–"]
    assert summary.problems() == [
        "d, seed 0: failed; training: status 1: the disk is full",
        "d, seed 1, 2: not run",
        "e, seed 0, 2: not run",
    ]


def test_files(summary: Summary) -> None:
    summary.write()
    out = summary.grid.out
    text = (out / "summary.md").read_text()
    assert summary.results_table() in text and "the disk is full" in text
    assert "10 trainings, 0.33 hours" in text and "cccccccccc+changes" in text and "torch 2" in text
    rows = list(csv.DictReader(io.StringIO((out / "summary.csv").read_text())))
    assert len(rows) == 15 and [row["share"] for row in rows if row["run"] == "b"] == ["0.5", "0.52", "0.53"]
    found = json.loads((out / "summary.json").read_text())
    assert found["runs"]["a"]["Linf 8/255"]["mean"] == pytest.approx(0.31)
    assert {"first": "a", "second": "b", "seeds": 3}.items() <= found["differences"][0].items()
    with Image.open(out / "summary.png") as image:
        assert min(image.size) > 100


def test_a_grid_that_has_not_run_has_a_summary(summary: Summary) -> None:
    Summary(summary.grid, [Result(entry, 0, "open") for entry in summary.grid.entries.values()], []).write()
    assert "Nothing has run yet" in (summary.grid.out / "summary.md").read_text()


@pytest.mark.parametrize(
    ("seeds", "images", "expected"),
    [
        ((0.01, 0.05), (0.02, 0.04), AGREES),
        ((-0.05, -0.01), (-0.04, -0.02), DOES_NOT),
        ((-0.01, 0.05), (0.02, 0.04), CANNOT_TELL),
        ((0.01, 0.05), (-0.02, 0.04), CANNOT_TELL),
        (None, (0.02, 0.04), AGREES),
        ((0.01, 0.05), None, AGREES),
        (None, None, CANNOT_TELL),
    ],
)
def test_verdicts(seeds, images, expected) -> None:
    assert verdict(Difference(0.03, seeds, images, 3 if seeds else 1)) == expected
    assert verdict(None) == NOT_RUN


def claims_file(tmp_path: Path, *claims: dict, **more) -> Path:
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"title": "Claims", "claims": list(claims), **more}))
    return path


def test_evidence(summary: Summary, tmp_path: Path) -> None:
    claims = [
        {"claim": "b is better", "paper": "1 → 2 %", "compare": ["a", "b"], "metric": "Linf 8/255"},
        {"claim": "a is better", "compare": ["b", "a"], "metric": "Linf 8/255"},
        {"claim": "c is better", "compare": ["a", "c"], "metric": "Linf 8/255"},
        {"claim": "e is better", "compare": ["a", "e"], "metric": "Linf 8/255"},
        {"claim": "d is better", "compare": ["a", "d"], "metric": "Linf 8/255"},
        {"claim": "under L2", "compare": ["a", "b"], "metric": "L2 0.5"},
        {"claim": "by more than itself", "compare": ["a", "b"], "metric": "Linf 8/255", "minus": "Linf 8/255"},
    ]
    path = claims_file(tmp_path, *claims, commands=["bash run_ablation.sh grid.yaml"], text="A text.", notes="A note.")
    write_evidence(summary, path, tmp_path / "docs")
    found = json.loads((tmp_path / "docs" / "evidence.json").read_text())["claims"]
    assert [c["verdict"] for c in found] == [AGREES, DOES_NOT, CANNOT_TELL, AGREES, NOT_RUN, NOT_RUN, CANNOT_TELL]
    assert {"claim", "paper", "ours", "ci95", "seeds", "verdict"} <= found[0].keys()
    assert found[0]["ours"] == 20.67 and found[0]["seeds"] == 3
    assert found[0]["ci95"] == pytest.approx([20.67 - 1.43, 20.67 + 1.43], abs=0.02)
    assert (tmp_path / "docs" / "evidence.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "docs" / "evidence.md").read_text()
    assert row_of(text, "e is better")[5] == "one seed" and row_of(text, "b is better")[1:3] == ["1 → 2 %", "+20.7"]
    assert all(words in text for words in ("# Claims", "A text.", "A note.", "bash run_ablation.sh grid.yaml", "a CPU"))


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ({"claim": "x", "compare": ["a", "z"], "metric": "clean"}, "compare: expected two of a, b, c, d, e"),
        ({"claim": "x", "compare": [["a"], "b"], "metric": "clean"}, "expected two of a, b, c, d, e; got [['a'], 'b']"),
        (
            {"claim": "x", "compare": ["a", "b"], "metric": ["clean"]},
            "metric: expected a metric that both a and b have",
        ),
        (
            {"claim": "x", "compare": ["a", "b"], "metric": "nonsense"},
            "(clean; Linf 8/255; L2 0.5; clean, all images; Linf 4/255, APGD-10); got 'nonsense'",
        ),
        (
            {"claim": "x", "compare": ["a", "b"], "metric": "clean", "minus": "Linf 4/255"},
            "minus: expected a metric that both a and b have",
        ),
        ({"claim": ["x"], "compare": ["a", "b"], "metric": "clean"}, "claim 1: claim: expected text"),
        ({"claim": "x", "paper": {}, "compare": ["a", "b"], "metric": "clean"}, "paper: expected text or a number"),
        ({"claim": "x", "metric": "clean"}, "claim 1: expected the keys"),
        ({"claim": "x", "compare": ["a", "b"], "metric": "clean", "sign": 1}, "claim 1: expected the keys"),
    ],
)
def test_rejected_claims(summary: Summary, tmp_path: Path, claim: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        write_evidence(summary, claims_file(tmp_path, claim), tmp_path / "docs")
    assert words in str(error.value) and not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"claims": []}, "a list `claims` of at least one claim"),
        ({"text": 5}, "text: expected text, got 5"),
        ({"notes": ["x"]}, "notes: expected text, got ['x']"),
        ({"commands": "bash x"}, "commands: expected a list of strings, got 'bash x'"),
    ],
)
def test_claims_files_are_rejected_before_training(summary: Summary, tmp_path: Path, capsys, more, words) -> None:
    content = {"claims": [{"claim": "x", "compare": ["a", "b"], "metric": "clean"}]} | more
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(content))
    grid = yaml.safe_load((tmp_path / "grid.yaml").read_text()) | {"claims": "claims.yaml"}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert main([str(tmp_path / "grid.yaml"), "--check"]) == 2
    assert words in capsys.readouterr().err


def test_evidence_without_texts_and_comparisons(summary: Summary, tmp_path: Path) -> None:
    summary.grid = dataclasses.replace(summary.grid, compare=())
    (tmp_path / "claims.yaml").write_text("claims: [{claim: x, paper: 48.6, compare: [a, b], metric: Linf 8/255}]")
    write_evidence(summary, tmp_path / "claims.yaml", tmp_path / "docs")
    assert row_of((tmp_path / "docs" / "evidence.md").read_text(), "x")[1:3] == ["48.6", "+20.7"]


def test_a_grid_that_evaluates_nothing_has_a_summary(summary: Summary) -> None:
    Summary(dataclasses.replace(summary.grid, entries={}, compare=()), [], summary.trainings).write()
    assert "No run is evaluated." in (summary.grid.out / "summary.md").read_text()
