"""Results of a grid so far, read from its folders."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ablation.grid import Cell, Entry, Grid
from ablation.running import evaluation_summary, is_share, json_or_nothing, read_record, train_status
from ablation.statistics import Value
from common.flags import load_config
from evaluation.config import EvalConfig
from evaluation.plan import show_eps
from training.status import read_log

CLEAN, CLEAN_ALL = "clean", "clean, all images"
# A network counts as guessing below this many standard deviations above chance: 98 % of guessing networks are.
GUESSING = 2.0


@dataclass
class Result:
    """One network under one evaluation: a row of the results for one seed.

    Attributes:
        status: finished; failed, diverged, stopped or open.
        notes: why it is not finished, and anything unusual.
        metrics: name → value.
        seconds: duration of the training and of this evaluation.
        provenance: provenance of the evaluation.
    """

    entry: Entry
    seed: int
    status: str
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, Value] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """One training, evaluated or used only as a start: its duration in seconds and its provenance ({} before it ran)."""

    arm: str
    seed: int
    seconds: float
    provenance: Mapping[str, Any]


def read_trainings(grid: Grid) -> list[Training]:
    """Read the trainings of all arms and seeds."""
    found = []
    for cell in grid.cells:
        seconds = read_record(cell)["stages"].get("train", {}).get("seconds", 0.0)
        provenance = _whole_provenance(json_or_nothing(cell.run_folder / "params.json").get("provenance"))
        found.append(Training(cell.arm.name, cell.seed, float(seconds), provenance))
    return found


def read_results(grid: Grid) -> list[Result]:
    """Read all results, entry by entry and seed by seed, including failed and missing ones."""
    return [read_result(grid.cell(entry.arm, seed), entry) for entry in grid.entries.values() for seed in grid.seeds]


def read_result(cell: Cell, entry: Entry) -> Result:
    """Read the result of one network under one evaluation."""
    stages = read_record(cell)["stages"]
    result = Result(entry, cell.seed, "open")
    for stage, name in (("train", "training"), (entry.name, "evaluation")):
        call = stages.get(stage, {})
        result.seconds[name] = float(call.get("seconds", 0.0))
        if call.get("reason"):
            result.status = call["status"]
            result.notes.append(f"{name}: {call['reason']}")
    trained, summary = train_status(cell) == "finished", evaluation_summary(cell, entry)
    if trained:
        last = _last_epoch(cell.run_folder / "log")
        result.metrics.update(_validation_metrics(cell, entry, last))
        result.notes += _oddities(last)
    finished = trained and summary is not None
    if finished:  # notes on earlier attempts no longer apply
        result.status, result.notes = "finished", [n for n in result.notes if ":" not in n]
    if summary is not None:
        for report in summary["evaluations"]:
            if provenance := _whole_provenance(report.get("provenance")):
                result.provenance.append(provenance)
            metrics = dict(_metrics(cell, entry, report, several=len(_sizes(summary)) > 1))
            result.metrics.update(metrics)
            if any(value.images is None for value in metrics.values()):
                name = f"{report['norm']} {show_eps(report['eps'])}, {report['data']['img_size']} px"
                result.notes.append(
                    f"evaluation damaged: no report.json of {name} has a verdicts.csv for the same {report['n']} images, so its "
                    f"intervals are wider; delete {cell.eval_folder(entry)} to repeat the evaluation"
                )
    elif (file := cell.eval_folder(entry) / "summary.json").exists():
        result.notes.append(f"evaluation damaged: {file} is not a valid summary; the next start repeats the evaluation")
    if finished:
        chance = 1 / cell.config.model.num_classes
        shares = [value for name, value in result.metrics.items() if name.startswith(CLEAN) and value.n]
        if any(v.share < chance + GUESSING * (chance * (1 - chance) / v.n) ** 0.5 for v in shares):
            result.notes.append("guesses")
    return result


def metric_names(cell: Cell, entry: Entry) -> list[str]:
    """Return the names of the metrics of a finished run under an evaluation; they follow from its flags."""
    settings = load_config(EvalConfig, cell.eval_argv(entry)).eval
    names = []
    for size in settings.img_size or (cell.config.validation.resolution,):
        px = _px(size, several=len(settings.img_size) > 1)
        names += [CLEAN + px, *(_threat(norm, eps) + px for norm, eps in zip(settings.norms, settings.eps))]
    return [*names, *_validations(cell, entry)]


def _metrics(cell: Cell, entry: Entry, report: Mapping[str, Any], *, several: bool) -> Iterator[tuple[str, Value]]:
    """Return the metrics of one report: clean accuracy and robust accuracy, with the verdicts of its images."""
    px = _px(report["data"]["img_size"], several=several)
    clean, standing = _verdicts(cell.eval_folder(entry), report) or (None, None)
    yield CLEAN + px, Value(report["clean_acc"], report["n"], clean)
    yield _threat(report["norm"], report["eps"]) + px, Value(report["robust_acc"], report["n"], standing)


def _px(size: int, *, several: bool) -> str:
    return f", {size} px" if several else ""


def _threat(norm: str, eps: float) -> str:
    return f"{norm} {show_eps(eps)}"


def _verdicts(folder: Path, report: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return two (N,) arrays of 0 and 1 for the images of a report: correct without attack, and correct under all attacks.

    Return None if a file is missing, truncated or inconsistent with the report.
    """
    for file in sorted(folder.rglob("report.json")):
        found = json_or_nothing(file)
        data = found.get("data")
        same = all(found.get(key) == report[key] for key in ("norm", "eps", "seed", "attacks"))
        if not same or not isinstance(data, dict) or data.get("img_size") != report["data"]["img_size"]:
            continue
        rows: list[dict[str, str]] = []
        with (
            suppress(OSError, csv.Error),
            open(file.with_name("verdicts.csv"), newline="", encoding="utf-8", errors="surrogateescape") as lines,
        ):
            rows = list(csv.DictReader(lines))
        if len(rows) != report["n"] or any(row.get("broken_by") is None for row in rows):
            return None
        clean = np.array([row["broken_by"] != "clean" for row in rows], dtype=float)
        standing = np.array([not row["broken_by"] for row in rows], dtype=float)
        agree = np.allclose([clean.mean(), standing.mean()], [report["clean_acc"], report["robust_acc"]])
        return (clean, standing) if agree else None
    return None


def _sizes(summary: Mapping[str, Any]) -> set[int]:
    return {report["data"]["img_size"] for report in summary["evaluations"]}


def _validation_metrics(cell: Cell, entry: Entry, last: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Return the metrics of the last epoch's validation of the same weights, if images and image size are the same."""
    for name, (key, n) in _validations(cell, entry).items():
        if is_share(last.get(key)):
            yield name, Value(last[key], n)


def _validations(cell: Cell, entry: Entry) -> dict[str, tuple[str, int]]:
    """Return metric → key in the record of the last epoch, and the number of images (0: unknown)."""
    config = cell.config
    size = str(config.validation.resolution)
    if dict(entry.flags).get("eval.img_size", size) != size:
        return {}
    prefix = "ema_" if cell.weights_kind(entry) == "ema" else ""
    found = {CLEAN_ALL: (f"{prefix}top1", 0)}
    if config.validation.adv_n_ex:
        name = f"{_threat(config.adv.norm, config.adv.eps)}, APGD-{config.validation.adv_n_iter}"
        found[name] = (f"{prefix}adv_top1", config.validation.adv_n_ex)
    return found


def _oddities(last: Mapping[str, Any]) -> list[str]:
    found = [f"{last[key]} {key.replace('_', ' ')}" for key in ("skipped_steps", "bad_images") if last.get(key)]
    return found + ["overfitting"] * ("overfitting" in last)


def _last_epoch(log: Path) -> dict[str, Any]:
    """Return the record of the last epoch, {} if there is none."""
    with suppress(OSError):
        return ([{}] + read_log(log, "epoch"))[-1]
    return {}


def _whole_provenance(found: Any) -> Mapping[str, Any]:
    """Return a record of `common.provenance`, {} if it is damaged."""
    if not isinstance(found, dict):
        return {}
    versions, devices = found.get("versions", {}), found.get("devices", [])
    if not isinstance(versions, dict) or not isinstance(devices, list) or not isinstance(found.get("threads", 1), int):
        return {}
    return found if all(isinstance(name, str) for name in [*versions.values(), *devices]) else {}
