"""Benchmark of runner_aa_eval.py against plain pyautoattack on the same network and images, in interleaved runs.

    python -m benchmarks.autoattack [--quick] [--json FILE] [--repeats 5] [--model RUN_FOLDER]
    python -m benchmarks.autoattack --cuda-model weights.pt --cuda-data /data/imagenet       on a GPU

On the CPU: held-out digits, one thread per process, wall time of whole programs. Without --model a small network is trained
first. On a GPU also ConvNeXt-B with ConvStem at 224 pixels, with robust weights: if the first attack breaks all images,
verdicts and times are not meaningful. Without such weights, a few attack steps on random weights are timed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import Row, environment, main, options, row, run_program, train_on_digits
from common.precision import float32_matmul
from evaluation.autoattack import perturb, standard_autoattack
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
IMAGENET_EPS = 4 / 255
STEPS, STEP_IMAGES = 20, 64


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


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Measure all rows, on the CPU and on a GPU."""
    with tempfile.TemporaryDirectory(prefix="autoattack") as folder:
        return [*on_cpu(arguments, Path(folder)), *on_gpu(arguments, Path(folder))]


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


def on_gpu(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure tf32, channels_last and compilation against true float32."""
    speedup, differing = ("cuda_speedup", "times plain", ">= 1.8"), ("cuda_differing", "verdicts of 512", "<= 3")

    def rows(
        figures: float | None, differ: float | None, note: str, differ_note: str, *, counts: bool = True
    ) -> list[Row]:
        pairs = [(speedup, figures, note), (differing, differ, differ_note)]
        return [
            row(name, None if f is None else [f], unit, target, note=n, counts=counts)
            for (name, unit, target), f, n in pairs
        ]

    if not torch.cuda.is_available():
        return rows(None, None, "no CUDA device", "no CUDA device")
    if arguments.cuda_model is None:
        ratio = time_steps(
            build_model("convnext_base", not_original=True, add_normalization=True),
            size=224,
            device=torch.device("cuda"),
        )
        note = f"{STEPS} steps of APGD-CE on random weights, batches of {STEP_IMAGES}; without start-up and compilation"
        return rows(ratio, None, note, "needs --cuda-model and --cuda-data: random weights are not robust")
    flags = [
        f"--eval.model_in={arguments.cuda_model}",
        "--model.arch=convnext_base",
        "--model.not_original=1",
        f"--data.val_dataset={arguments.cuda_data}",
        "--eval.norms=Linf",
        f"--eval.eps={IMAGENET_EPS}",
        f"--eval.n_ex={arguments.cuda_images}",
        f"--eval.batch_size={min(128, arguments.cuda_images)}",
        f"--eval.fullaa={arguments.cuda_fullaa}",
        "--eval.gpus=0",
    ]
    plain = run_plain(flags, folder / "cuda_plain")
    fast = ("--eval.precision=tf32", "--eval.channels_last=1", "--eval.compile=1")
    found = run_ours([*flags, *fast], folder / "cuda_ours")
    differ = sum(found.verdicts[position] != verdict for position, verdict in plain.verdicts.items())
    what = f"{len(plain.verdicts)} images, {'all' if arguments.cuda_fullaa else 'first two'} attacks"
    note = f"{what}, plain {plain.seconds:.0f} s, this implementation {found.seconds:.0f} s"
    return rows(plain.seconds / found.seconds, differ, note, what, counts=not arguments.quick)


def time_steps(model: nn.Module, *, size: int, device: torch.device) -> float:
    """Return the speed-up of APGD-CE steps in the fast form: median of three interleaved runs after one warm-up."""
    model = model.to(device).eval().requires_grad_(False)
    x = torch.rand(STEP_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(dim=1)
    fast = torch.compile(copy.deepcopy(model).to(memory_format=torch.channels_last), dynamic=True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(4):
        for is_fast, attacked in ((False, model), (True, fast)):
            engine = standard_autoattack(
                attacked, norm="Linf", eps=IMAGENET_EPS, seed=0, device=device, num_classes=logits.shape[1]
            )
            engine.apgd.n_iter = STEPS
            begin = time.perf_counter()
            with float32_matmul(tf32=is_fast):
                perturb(engine, "apgd-ce", x, y, seed=0).cpu()  # the copy waits for the GPU
            seconds[is_fast].append(time.perf_counter() - begin)
    return statistics.median(seconds[False][1:]) / statistics.median(seconds[True][1:])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, help="rounds (default 5; 1 with --quick)")
    parser.add_argument("--model", type=Path, help="run folder or weights of a digits network (default: train one)")
    parser.add_argument("--cuda-model", type=Path, help="robust weights of ConvNeXt-B with ConvStem")
    parser.add_argument("--cuda-data", help="validation images of ImageNet, as data.val_dataset")
    parser.add_argument("--cuda-images", type=int, default=512, help="number of validation images")
    parser.add_argument(
        "--cuda-fullaa", type=int, choices=(0, 1), default=1, help="1: all four attacks; 0: the first two"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(measure, parse(sys.argv[1:])))
