"""Whether speed costs robustness: the digits demo, trained with one feature of speed at a time, over several seeds.

    python -m benchmarks.same_result [--seeds 3] [--folder DIR] [--quick] [--json FILE]

Each seed's clean network is trained once, in float32 and uncompiled; from it start the adversarial trainings of
configs/demo_robust.yaml. Robust accuracy is that of APGD-CE + APGD-T on the held-out digits (configs/demo_eval.yaml).
The same --folder goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Row, main, options, row, run_program, train_on_digits
from common.files import writable
from common.provenance import PROJECT

TOLERANCE = 1.5  # points
LEAN = ("--training.reuse_forward", "--training.trim_last_block")
PLAIN = ("--training.compile=0", "--training.precision=fp32", *(f"{flag}=0" for flag in LEAN))
VARIANTS = {  # later flags take the place of earlier ones
    "eager_fp32": PLAIN,
    "compiled_fp32": (*PLAIN, "--training.compile=1"),
    "eager_bf16": (*PLAIN, "--training.precision=bf16"),
    "lean_fp32": (*PLAIN, *(f"{flag}=1" for flag in LEAN)),
}
QUICK = ("--training.epochs=1", "--adv.eps_warmup_epochs=0.5")


def train_and_attack(folder: Path, seed: int, *, quick: bool) -> dict[str, float]:
    """Robust accuracy of each variant for one seed, in percent."""
    seeded = (f"--data.seed={seed}", "--training.resume=auto", *(QUICK[:1] if quick else ()))
    clean = train_on_digits(folder / f"seed{seed}" / "clean", "demo_clean", "--training.compile=0", *seeded)
    found = {}
    for name, flags in VARIANTS.items():
        more = (*seeded, *flags, f"--model.ckpt_path={clean}", *(QUICK[1:] if quick else ()))
        found[name] = attack(train_on_digits(folder / f"seed{seed}" / name, "demo_robust", *more), quick=quick)
        print(f"seed {seed}, {name}: {found[name]:.1f} %", file=sys.stderr)
    return found


def attack(run: Path, *, quick: bool) -> float:
    """Robust accuracy of a run's weights, in percent."""
    flags = [f"--eval.model_in={run}", "--eval.gpus=none", f"--eval.out={run / 'eval'}"]
    few = ["--eval.n_ex=20", "--eval.batch_size=20"] if quick else []
    run_program(["runner_aa_eval.py", "--config-file", str(PROJECT / "configs" / "demo_eval.yaml"), *flags, *few])
    (evaluation,) = json.loads((run / "eval" / "summary.json").read_text())["evaluations"]
    return 100 * evaluation["robust_acc"]


def rows(found: Sequence[dict[str, float]], *, counts: bool) -> list[Row]:
    """Accuracies over the seeds, and how far their means lie apart."""
    means = {name: statistics.mean(one[name] for one in found) for name in VARIANTS}
    apart = [
        row(
            f"robust_accuracy_difference_{name}",
            [abs(means[name] - means["eager_fp32"])],
            "points",
            f"<= {TOLERANCE}",
            note="of means over the seeds, to eager_fp32",
            counts=counts,
        )
        for name in VARIANTS
        if name != "eager_fp32"
    ]
    return apart + [row(f"robust_accuracy_{name}", [one[name] for one in found], "%") for name in VARIANTS]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory(prefix="same") as temporary:
        folder = arguments.folder or Path(temporary)
        with writable("--folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
        seeds = range(1 if arguments.quick else arguments.seeds)
        found = [train_and_attack(folder, seed, quick=arguments.quick) for seed in seeds]
    return rows(found, counts=not arguments.quick)


if __name__ == "__main__":
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where runs are kept; default: a temporary one")
    sys.exit(main(measure, parser.parse_args()))
