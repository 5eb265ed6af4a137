"""Throughput over processes: measured on this machine, and predicted for clusters.

    python -m benchmarks.scaling measure [--processes 1,2] [--repeats 3] [--quick] [--json FILE]
    python -m benchmarks.scaling predict [--measured FILE] [--write]

`measure` trains the demo's network (APGD-2, digits) with each number of processes, in turns, with the same global batch; on a
CPU each process has one thread. `predict` prints docs/scaling.md (`--write`: writes it): what every published run costs on 8, 64
and 512 GPUs. A step's time comes from measured rows `images_per_second_ours_<arch>` (of `benchmarks.train_step --json`) or, where
there are none, from an assumed share of an assumed rate of matrix products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, environment, main, options, row, run_program
from common.config import TrainConfig, load_config
from common.errors import UserError
from common.files import write_atomically
from common.provenance import PROJECT
from common.tables import markdown_table
from training.forecast import MEASURED_SECONDS
from zoo.published import PUBLISHED, Published

GLOBAL_BATCH = 64
IMAGES = 1_281_167  # ImageNet's training set
BATCH = 80  # a GPU
SETTING = f"batch {BATCH}, 224 px"  # as the notes of benchmarks.train_step begin
PASSES = 8  # forward-equivalents of APGD-2 training: 3 forwards and 2 input gradients, then forward and backward (2)
OVERLAP = 2 / PASSES  # share of a step during which gradients are summed while others are still computed
GPUS = (8, 64, 512)
DOCUMENT = PROJECT / "docs" / "scaling.md"


@dataclass(frozen=True)
class Cluster:
    """What a prediction assumes of the machines.

    Attributes:
        matmul: half-precision matrix products of a GPU, in FLOP/s: an assumed 0.7 of the 989e12 in NVIDIA's data sheet for
            H100 and H200 SXM.
        gpus_per_node: joined by NVLink.
        node_bandwidth: bytes/s of an all-reduce within a node (bus bandwidth).
        network_bandwidth: bytes/s of an all-reduce over nodes, likewise: four fifths of one 400 Gbit/s adapter a node.
    """

    matmul: float = 700e12
    gpus_per_node: int = 8
    node_bandwidth: float = 300e9
    network_bandwidth: float = 40e9


@dataclass(frozen=True)
class Prediction:
    """One published run on a number of GPUs; times in seconds."""

    images_per_second: float
    step: float
    all_reduce: float
    waits: float  # what of the all-reduce the backward pass does not hide

    @property
    def epoch_hours(self) -> float:
        """Of one pass over ImageNet."""
        return IMAGES / self.images_per_second / 3600


def assumed_share(published: Published) -> float:
    """Share of `Cluster.matmul` that a training step is assumed to reach where none was measured: this project's goals."""
    small = published.params < 60
    if published.family == "ViT":
        return 0.28 if small else 0.38
    return 0.14 if small else 0.22


def step_seconds(published: Published, cluster: Cluster, measured: Mapping[str, float]) -> float:
    """Seconds that one GPU computes for a step of `BATCH` images; `measured`: images/s of one GPU by architecture."""
    if published.arch in measured:
        return BATCH / measured[published.arch]
    return BATCH * PASSES * 2 * published.gflops * 1e9 / (assumed_share(published) * cluster.matmul)


def all_reduce_seconds(parameters: float, gpus: int, cluster: Cluster) -> float:
    """A ring all-reduce of float32 gradients moves 2 (N − 1)/N times their bytes over its slowest link."""
    slowest = cluster.node_bandwidth if gpus <= cluster.gpus_per_node else cluster.network_bandwidth
    return 2 * (gpus - 1) / gpus * 4 * parameters / slowest


def predict(published: Published, gpus: int, cluster: Cluster, measured: Mapping[str, float]) -> Prediction:
    """One published run on so many GPUs, each with `BATCH` images."""
    computing = step_seconds(published, cluster, measured)
    reducing = all_reduce_seconds(published.params * 1e6, gpus, cluster)
    waits = max(reducing - OVERLAP * computing, 0.0)
    step = computing + waits
    return Prediction(gpus * BATCH / step, step, reducing, waits)


def document(cluster: Cluster, measured: Mapping[str, float], device: str) -> str:
    """docs/scaling.md. `measured`, `device`: as from `read_measured`."""
    rows = [_cells(published, cluster, measured) for published in PUBLISHED.values()]
    source = (
        f"Step times are measured on {device} where the row does not say otherwise."
        if measured
        else "No step has been measured on a GPU yet: **all step times are assumed**."
    )
    matmul = f"{cluster.matmul / 1e12:.0f} TFLOP/s"
    within, between = (f"{rate / 1e9:.0f} GB/s" for rate in (cluster.node_bandwidth, cluster.network_bandwidth))
    return f"""# What the published runs cost on 8, 64 and 512 GPUs

Made by `python -m benchmarks.scaling predict --write`; a prediction, not a measurement. {source}

- Assumed step times: {PASSES} forward passes' FLOPs for each image (APGD-2: 3 forwards and 2 input gradients; training: forward and
  backward), {BATCH} images a GPU, at a share of {matmul} (assumed for large bf16 matrix products of an H100 or
  H200; the data sheet says 989) that is this project's goal: 28 % for ViTs below 60 M parameters, 38 % for larger ones, 14 % and
  22 % for ConvNeXts.
- All-reduce: a ring, float32 gradients, {within} within a node of {cluster.gpus_per_node} GPUs, {between} over nodes (one
  adapter of 400 Gbit/s a node). The training's backward pass, a quarter of the step, hides it; what is left is in brackets.
- Images always arrive in time, and validation is not counted. The global batch grows with the GPUs, the learning rate does not:
  nothing is published about batches of {BATCH * GPUS[1]:,} or {BATCH * GPUS[2]:,} images.

{markdown_table(rows)}

A run prints a forecast of its own, from {MEASURED_SECONDS:.0f} s of training after its warm-up.
"""


def _cells(published: Published, cluster: Cluster, measured: Mapping[str, float]) -> dict[str, Any]:
    assumed = "" if published.arch in measured else " (assumed)"
    cells: dict[str, Any] = {
        "run": f"[{published.title}](../{published.config})",
        "epochs": published.epochs,
        "gradients, MB": f"{4 * published.params:.0f}",
        "step, ms": f"{1000 * step_seconds(published, cluster, measured):.0f}{assumed}",
    }
    for gpus in GPUS:
        p = predict(published, gpus, cluster, measured)
        cells[f"{gpus} GPUs: images/s"] = f"{p.images_per_second:,.0f}"
        cells[f"{gpus}: all-reduce, ms"] = f"{1000 * p.all_reduce:.1f} ({1000 * p.waits:.1f})"
        cells[f"{gpus}: GPU-hours"] = f"{p.epoch_hours * published.epochs * gpus:,.0f}"
    return cells


def read_measured(path: Path | None) -> tuple[dict[str, float], str]:
    """Images/s of one GPU by architecture, and the device, from a result of `benchmarks.train_step` with `SETTING`."""
    if path is None:
        return {}, ""
    try:
        content = json.loads(path.read_text())
        prefix = "images_per_second_ours_"
        rows = [r for r in content["rows"] if r["name"].startswith(prefix) and r["figure"]]
        if other := [r["note"] for r in rows if not r["note"].startswith(SETTING)]:
            raise UserError(f"--measured: expected steps of {SETTING}, got {other[0]} in {path}.")
        return {r["name"].removeprefix(prefix): r["figure"] for r in rows}, content["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--measured: expected a result of benchmarks.train_step with rows images_per_second_ours_<arch>, got {path} ({error})."
        ) from error


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Images/s with each number of processes, and how they compare with one."""
    epochs, repeats = (2, 1) if arguments.quick else (6, arguments.repeats)
    rates: dict[int, list[float]] = {count: [] for count in arguments.processes}
    with tempfile.TemporaryDirectory(prefix="scaling") as folder:
        for repeat in range(repeats):
            for count in arguments.processes:
                rates[count].append(_images_per_second(Path(folder) / f"{repeat}_{count}", count, epochs))
    rows = [
        row(
            f"images_per_second_{count}p",
            rates[count],
            "images/s",
            note=f"{count} × {GLOBAL_BATCH // count} images a step",
        )
        for count in arguments.processes
    ]
    first = arguments.processes[0]
    for count in arguments.processes[1:]:
        ratios = [b / a for a, b in zip(rates[first], rates[count])]
        rows.append(row(f"speedup_{count}p_over_{first}p", ratios, "times", note="same global batch, in turns"))
    return rows


def _images_per_second(folder: Path, processes: int, epochs: int) -> float:
    """Of the epochs after the first."""
    argv = [
        *("--config-file", str(PROJECT / "configs" / "demo_robust.yaml")),
        f"--logging.folder={folder}",
        f"--training.batch_size={GLOBAL_BATCH // processes}",
        f"--training.epochs={epochs}",
        "--validation.freq=1",
        "--validation.adv_n_ex=0",
        "--logging.ckpt_minutes=0",
        "--logging.save_freq=1000",
        "--logging.log_level=0",
    ]
    if processes > 1:
        argv += ["--training.distributed=1", f"--dist.world_size={processes}"]
    run_program(["train.py", *argv], env=environment())
    log = folder / load_config(TrainConfig, argv).run_name / "log"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.median([r["images_per_second"] for r in records if "images_per_second" in r][1:])


def counts(text: str) -> list[int]:
    """Numbers from text such as "1,2", for argparse."""
    numbers = [int(number) for number in text.split(",")]
    if any(number < 1 or GLOBAL_BATCH % number for number in numbers):
        raise ValueError(text)
    return numbers


def _predict(arguments: argparse.Namespace) -> int:
    try:
        text = document(Cluster(), *read_measured(arguments.measured))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.write:
        write_atomically(DOCUMENT, lambda file: file.write(text.encode()))
    else:
        print(text, end="")
    return 0


def _run(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("what", choices=["measure", "predict"])
    parser.add_argument("--processes", type=counts, default=[1, 2], metavar="N,N", help="measure: default 1,2")
    parser.add_argument("--repeats", type=int, default=3, help="measure: rounds (default 3)")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="predict: a result of benchmarks.train_step")
    parser.add_argument("--write", action="store_true", help="predict: write docs/scaling.md")
    arguments = parser.parse_args(argv)
    return _predict(arguments) if arguments.what == "predict" else main(measure, arguments)


if __name__ == "__main__":
    sys.exit(_run())
