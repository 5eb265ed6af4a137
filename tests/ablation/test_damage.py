"""Grids with damaged files: valid results are summarised, damaged ones are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ablation.__main__ import main
from ablation.grid import Cell, Grid, load_grid
from ablation.results import read_results, read_trainings
from ablation.running import is_finished, note, read_record
from ablation.summary import Summary

TRAIN = {"data": {"train_dataset": "digits", "val_dataset": "digits", "num_workers": 0, "in_memory": 0}}
PROVENANCE = {"commit": "c" * 40, "python": "3.11", "versions": {"torch": "2"}, "devices": ["a CPU"], "threads": 1}
BROKEN_BY = ["clean", "apgd-ce", "apgd-t", "", "", "", "", ""]
REPORT = {
    "norm": "Linf",
    "eps": 4 / 255,
    "seed": 0,
    "attacks": ["apgd-ce", "apgd-t"],
    "n": len(BROKEN_BY),
    "clean_acc": 7 / 8,
    "robust_acc": 5 / 8,
    "data": {"img_size": 224},
    "provenance": PROVENANCE,
}
VERDICTS = "index,path,label,clean_pred,broken_by\n" + "".join(f"{i},x,0,0,{by}\n" for i, by in enumerate(BROKEN_BY))


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    """Return a grid with the runs a and b, both finished and evaluated."""
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"train": TRAIN, "arms": {"a": {}, "b": {}}, "seeds": [0]}))
    grid = load_grid(path, out=tmp_path / "out")
    for cell in grid.cells:
        for name, content in whole_files(cell).items():
            write(place(cell, name), content)
        for stage in ("train", cell.arm.name):
            note(cell, stage, "finished", "", 60.0)
    return grid


def whole_files(cell: Cell) -> dict[str, object]:
    return {
        "status.json": {"status": "finished"},
        "params.json": {"provenance": PROVENANCE},
        "log": json.dumps({"top1": 0.9, "adv_top1": 0.5}),
        "summary.json": {"evaluations": [REPORT]},
        "report.json": REPORT,
        "verdicts.csv": VERDICTS,
    }


def place(cell: Cell, name: str) -> Path:
    (entry,) = cell.entries()
    folders = {"record.json": cell.folder, "summary.json": cell.eval_folder(entry)}
    folders |= dict.fromkeys(("report.json", "verdicts.csv"), cell.eval_folder(entry) / "network" / "Linf")
    return folders.get(name, cell.run_folder) / name


def summary_of(grid: Grid) -> Summary:
    """Return the summary after creating all its outputs except the bar chart."""
    summary = Summary(grid, read_results(grid), read_trainings(grid))
    assert summary.markdown() and summary.csv() and summary.json()
    return summary


def test_a_run_with_images_elsewhere_is_checked_again(grid: Grid) -> None:
    cell = grid.cells[0]
    for images, finished in ((cell.config.data.train_dataset + "/", True), ("elsewhere", False)):
        write(place(cell, "params.json"), {"data": {"train_dataset": images}, "provenance": PROVENANCE})
        assert is_finished(cell) == finished


def test_nothing_is_wrong_with_whole_files(grid: Grid) -> None:
    summary = summary_of(grid)
    assert not summary.problems() and all(map(is_finished, grid.cells))
    assert [value.images.sum() for value in summary.results[0].metrics.values() if value.n == 8] == [7, 5]


CALL = {"status": "failed", "reason": "status 1: x", "seconds": 1.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("status.json", content) for content in ({}, [], 5, "")),
        pytest.param("status.json", "[" * 100_000, id="deep"),
        *(("params.json", content) for content in ([], {"provenance": 5}, {"provenance": {"versions": [1]}})),
        ("params.json", {"provenance": PROVENANCE | {"devices": [[1]]}}),
        ("params.json", {"provenance": PROVENANCE | {"threads": "x"}}),
        ("log", json.dumps({"top1": "x", "adv_top1": [1]})),
        *(("record.json", content) for content in ([], {"stages": []}, {"stages": {"train": 5}})),
        *(("record.json", {"stages": {"train": CALL | {"seconds": value}}}) for value in ("x", None, -1)),
        ("record.json", {"stages": {"train": {"reason": "status 1: x"}}}),
        ("record.json", {"stages": {"train": {"reason": "status 1: x", "seconds": 1.0}}}),
    ],
)
def test_damaged_files_of_a_training(grid: Grid, name: str, content: object) -> None:
    cell, whole = grid.cells[0], summary_of(grid).results[1]
    write(place(cell, name), content)
    found = summary_of(grid).results
    assert found[1].metrics.keys() == whole.metrics.keys() and found[1].status == "finished"
    assert found[0].status == ("open" if name == "status.json" else "finished")
    note(cell, "train", "stopped", "", 1.0)  # keeps the valid parts of the record
    assert read_record(cell)["stages"]["train"]["status"] == "stopped"


def without(key: str) -> dict:
    return {"evaluations": [{name: value for name, value in REPORT.items() if name != key}]}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"evaluations": 5},
        {"evaluations": [{}]},
        {"evaluations": [REPORT | {"n": 0}]},
        {"evaluations": [REPORT | {"robust_acc": "x"}]},
        {"evaluations": [REPORT | {"data": {}}]},
        *(without(key) for key in ("norm", "eps", "seed", "attacks", "n", "clean_acc", "data")),
    ],
)
def test_a_damaged_summary_of_an_evaluation_is_reported_and_repeated(grid: Grid, content: object) -> None:
    write(place(grid.cells[0], "summary.json"), content)
    (problem,) = summary_of(grid).problems()
    assert problem.startswith("a, seed 0: open; evaluation damaged: ") and "summary.json" in problem
    assert not is_finished(grid.cells[0]) and is_finished(grid.cells[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", None),
        ("report.json", []),
        ("report.json", {key: value for key, value in REPORT.items() if key != "data"}),
        ("verdicts.csv", None),
        ("verdicts.csv", VERDICTS[: len(VERDICTS) // 2]),
        ("verdicts.csv", VERDICTS.replace("broken_by", "broken")),
        ("verdicts.csv", VERDICTS[:-3]),
        ("verdicts.csv", VERDICTS.replace("apgd-t", "")),
    ],
)
def test_damaged_verdicts_are_reported_and_the_images_count_as_unpaired(grid: Grid, name: str, content: object) -> None:
    for cell in grid.cells:
        write(place(cell, name), content) if content is not None else place(cell, name).unlink()
    summary = summary_of(grid)
    assert [line.split(": no ")[0] for line in summary.problems()] == [
        "a, seed 0: finished; evaluation damaged",
        "b, seed 0: finished; evaluation damaged",
    ]
    assert {value.images is None for value in summary.results[0].metrics.values()} == {True}
    assert summary.mean("a", "Linf 4/255").mean == 5 / 8
    assert summary.difference("a", "b", "Linf 4/255").ci95_images[1] > 0.3


def test_the_command_succeeds(grid: Grid, tmp_path: Path, capsys) -> None:
    write(place(grid.cells[0], "status.json"), [])
    write(place(grid.cells[0], "record.json"), {"stages": []})
    place(grid.cells[1], "report.json").unlink()
    assert main([str(tmp_path / "grid.yaml"), f"--out={grid.out}", "--summary"]) == 0
    assert "b, seed 0: finished; evaluation damaged: " in capsys.readouterr().out
