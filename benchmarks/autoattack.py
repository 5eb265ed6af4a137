"""Benchmark of runner_aa_eval.py against plain pyautoattack on the same network and images.

    python -m benchmarks.autoattack [--quick] [--json FILE] [--repeats 5] [--model RUN_FOLDER]

On a CPU: held-out digits, one thread per process, wall time of whole programs, in interleaved runs. Without --model a small
network is trained first. On a GPU: each attack on ConvNeXt-T at 224 pixels, plain and on the fast copy.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from benchmarks.harness import Row, environment, main, options, row, run_program, train_on_digits
from evaluation.autoattack import attack_chunk
from evaluation.config import ATTACKS
from utils_architecture import ARCHITECTURES
from zoo.models import build_model

# About 20 seconds of training, after which a good part of the images withstands all attacks.
TRAINING = (
    "--training.epochs=5",
    "--adv.eps_warmup_epochs=3",
    "--lr.lr_peak_epoch=1",
    "--validation.freq=5",
    "--validation.adv_n_ex=0",
)
DIGITS = (
    "--data.val_dataset=digits",
    "--data.num_workers=0",
    "--eval.norms=Linf",
    "--eval.eps=0.12",
    "--eval.img_size=32",
    "--eval.crop_pct=1",
    "--eval.gpus=none",
)
FULL = ("--eval.n_ex=6", "--eval.batch_size=1", "--eval.fullaa=1")
QUICK = ("--eval.n_ex=4", "--eval.batch_size=2", "--eval.fullaa=0")
TOO_SMALL = "--quick: program start-up takes longer than the attacks"


@dataclass(frozen=True)
class Run:
    """One evaluation: wall seconds of the program, verdict by position, share of worker time outside attacks (runner only)."""

    seconds: float
    verdicts: dict[int, str]
    overhead: float | None = None


def run_plain(flags: Sequence[str], folder: Path) -> Run:
    """Run pyautoattack's own loop in a new process."""
    arguments = ["-m", "benchmarks.plain_autoattack", *flags, f"--eval.out={folder}"]
    seconds = run_program(arguments, env=environment())
    with open(folder / "verdicts.csv", newline="") as file:
        return Run(seconds, {int(position): verdict for position, verdict in csv.reader(file)})


def run_ours(flags: Sequence[str], folder: Path) -> Run:
    """Run runner_aa_eval.py in a new process."""
    seconds = run_program(["runner_aa_eval.py", *flags, f"--eval.out={folder}"], env=environment())
    (report,) = folder.rglob("report.json")
    figures = json.loads(report.read_text())
    kinds = {"clean": "clean", "": "robust"}
    with open(report.with_name("verdicts.csv"), newline="") as file:
        verdicts = {int(line["index"]): kinds.get(line["broken_by"], "broken") for line in csv.DictReader(file)}
    return Run(seconds, verdicts, 1 - sum(figures["attack_seconds"].values()) / figures["worker_seconds"])


def measure(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of whole programs on the CPU, or those of a GPU."""
    if torch.cuda.is_available():
        yield from fast_copy(torch.device("cuda"), arch="convnext_tiny", size=224, images=64)
    elif arguments.fast_copy:
        yield from fast_copy(torch.device("cpu"), arch="convnext_micro", size=32, images=8, attacks=ATTACKS[:1])
    else:
        with tempfile.TemporaryDirectory(prefix="autoattack") as folder:
            yield on_cpu(arguments, Path(folder))


def on_cpu(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure `repeats` rounds of plain, one worker and two workers; ratios are taken within a round."""
    network = arguments.model or train_on_digits(folder, "demo_robust", *TRAINING)
    flags = [f"--eval.model_in={network}", *DIGITS, *(QUICK if arguments.quick else FULL)]
    plain, one, two = [], [], []
    for number in range(arguments.repeats or (1 if arguments.quick else 5)):
        plain.append(run_plain(flags, folder / f"plain_{number}"))
        one.append(run_ours([*flags, "--eval.workers=1"], folder / f"one_{number}"))
        two.append(run_ours([*flags, "--eval.workers=2"], folder / f"two_{number}"))
        seconds = [f"{name} {runs[-1].seconds:.1f} s" for name, runs in zip(("plain", "one", "two"), (plain, one, two))]
        print(f"round {number + 1}: {', '.join(seconds)}", file=sys.stderr)
    verdicts = list(plain[0].verdicts.values())
    found = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("robust", "broken", "clean"))
    same = all(run.verdicts == reference.verdicts for reference in plain for run in (*one, *two))
    full, small = not arguments.quick, TOO_SMALL if arguments.quick else ""

    def ratios(runs: list[Run], to: list[Run]) -> list[float]:
        return [run.seconds / other.seconds for run, other in zip(runs, to)]

    return [
        row("plain_seconds", [run.seconds for run in plain], "s"),
        row("one_worker_seconds", [run.seconds for run in one], "s"),
        row("two_workers_seconds", [run.seconds for run in two], "s"),
        row("one_worker", ratios(one, plain), "of plain", "<= 1.05", counts=full, note=small),
        row("two_workers", ratios(two, one), "of one worker", "<= 0.6", counts=full, note=small),
        row("overhead", [run.overhead for run in one], "of worker time", "< 0.01", counts=full, note=small),
        row("verdicts_equal", [float(same)], "1: all", "== 1", note=f"{len(verdicts)} images: {found}"),
    ]


def fast_copy(
    device: torch.device, *, arch: str, size: int, images: int, attacks: Sequence[str] = ATTACKS
) -> Iterator[list[Row]]:
    """Yield the rows of each attack: AutoAttack on the network against a copy in channels_last, on a GPU compiled and in TF32.

    The network has random weights, and each image has the class that the network predicts. The radius is one at which a short
    attack breaks half of the images, so that verdicts can differ.
    """
    torch.manual_seed(0)
    stem = ARCHITECTURES[arch].conv_stem is not None
    model = build_model(arch, not_original=stem, add_normalization=True).to(device).eval().requires_grad_(False)
    x = torch.rand(images, 3, size, size)
    with torch.no_grad():
        y = model(x.to(device)).argmax(dim=1).cpu()
    eps = halving_radius(model, x.to(device), y.to(device))
    run = partial(attack_chunk, model, norm="Linf", eps=eps, seed=0, device=device)
    fast, tf32 = copy.deepcopy(model).to(memory_format=torch.channels_last), device.type == "cuda"
    if device.type == "cuda":
        fast = torch.compile(fast, dynamic=True)
        run(x[:2], y[:2], attacks=attacks[:1], fast=fast, tf32=tf32)
    for attack in attacks:
        plain, quick = (run(x, y, attacks=[attack], **form) for form in ({}, {"fast": fast, "tf32": tf32}))
        seconds, fast_seconds = (sum(found.attack_seconds.values()) for found in (plain, quick))
        differing = sum(a != b for a, b in zip(plain.broken_by, quick.broken_by))
        broken = sum(map(bool, plain.broken_by))
        note = (
            f"{arch}, {size} px, Linf {eps:.2g}: {broken} of {images} broken; {seconds:.3g} s and {fast_seconds:.3g} s"
        )
        yield [
            row(f"speedup_{attack}", [seconds / fast_seconds], "times", note=note),
            row(f"differing_{attack}", [float(differing)], f"verdicts of {images}", "<= 1"),
        ]


def halving_radius(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return a Linf radius at which five steps of APGD break about half of the images."""
    low, high = 0.0, 0.5
    for _ in range(12):
        eps = (low + high) / 2
        broken = 1 - apgd(model, x, y, norm="Linf", eps=eps, n_iter=5).acc.float().mean()
        low, high = (low, eps) if broken > 0.5 else (eps, high)
    return (low + high) / 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, help="rounds (default 5; 1 with --quick)")
    parser.add_argument("--model", type=Path, help="run folder or weights of a digits network (default: train one)")
    parser.add_argument(
        "--fast-copy", action="store_true", help="on a CPU: one attack in the form for GPUs, a small trial"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(measure, parse(sys.argv[1:])))
