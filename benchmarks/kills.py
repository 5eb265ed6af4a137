"""Programs killed at random moments and started again, against ones that are left alone.

    python -m benchmarks.kills evaluation [--kills 20] [--workers 2] [--seed 0] [--quick] [--json FILE]
    python -m benchmarks.kills training [--kills 20] [--processes 1,2] [--seed 0] [--quick] [--json FILE]

SIGKILL goes to the main process, which can do nothing about it (in training with several processes, to each in turn): the
others have to end by themselves, and what is on disk has to be whole. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import Row, main, options, row, train_on_digits
from benchmarks.killing import PATIENCE, POLL_SECONDS, Run
from benchmarks.kills_training import FLAGS, GLOBAL_BATCH, kill_training, training_rows
from evaluation.records import RECORD_KEYS

TRAINING = ("--training.epochs=4", "--validation.freq=4", "--validation.adv_n_ex=0")
DIGITS = (
    "--data.val_dataset=digits",
    "--data.num_workers=0",
    "--eval.img_size=32",
    "--eval.crop_pct=1",
    "--eval.norms=Linf",
    "--eval.eps=0.04",
    "--eval.fullaa=0",
    "--eval.gpus=none",
)


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills: main processes killed while they ran.
        evaluations: evaluations that came to their end; after the first, the others were started to have time for all kills.
        verdicts, broken: images in verdicts.csv, and those of them that an attack broke.
        different: evaluations whose verdicts.csv is not that of the undisturbed one, byte for byte.
        chunks: chunks of one evaluation.
        kept: for each kill, the number of finished chunks on disk.
        damaged: records found half-written, of another form, or with other content than before; and temporary files at an end.
        lost: records that disappeared.
        left_behind: processes that still ran `PATIENCE` seconds after a kill.
        vanish_seconds: for each kill, how long the last process took to end.
    """

    kills: int = 0
    evaluations: int = 0
    verdicts: int = 0
    broken: int = 0
    different: int = 0
    chunks: int = 0
    kept: list[int] = field(default_factory=list)
    damaged: int = 0
    lost: int = 0
    left_behind: int = 0
    vanish_seconds: list[float] = field(default_factory=list)


def kill_evaluation(flags: Sequence[str], folder: Path, *, kills: int, seed: int) -> Outcome:
    """Run an evaluation undisturbed, then again and again until `kills` of its runs were killed and the last came to its end.

    Args:
        flags: of runner_aa_eval.py: one network, size and norm; without eval.out.
        folder: for state and reports.
        kills: how many.
        seed: of the moments.

    Raises:
        UserError: a run failed by itself.
    """
    moments, outcome = random.Random(seed), Outcome()
    expected, latest = _undisturbed(flags, folder / "undisturbed", outcome, kills)
    number, known, unfinished = 0, {}, False
    while outcome.kills < kills or unfinished:
        state = folder / f"killed_{number}"
        moment = moments.uniform(0, latest) if outcome.kills < kills else None
        with _start(flags, state) as run:
            death = None if run.ends_before(moment) else run.kill()
        unfinished = death is not None
        if unfinished:
            outcome.kills += 1
            outcome.vanish_seconds.append(death.seconds)
            outcome.left_behind += death.left
            known = _compare(state, known, outcome)
            outcome.kept.append(len(known))
            continue
        run.check()
        _compare(state, known, outcome)
        outcome.evaluations += 1
        outcome.different += _only(state, "verdicts.csv").read_bytes() != expected
        outcome.damaged += len(list(state.rglob("*.part")))
        number, known = number + 1, {}
    return outcome


def _start(flags: Sequence[str], state: Path) -> Run:
    return Run(["runner_aa_eval.py", *flags, f"--eval.out={state}"])


def _undisturbed(flags: Sequence[str], state: Path, outcome: Outcome, kills: int) -> tuple[bytes, float]:
    """Verdicts of an evaluation left alone, and the latest moment for a kill: so that most of the work is under fire.

    With starts of s seconds and kills at moments uniform in [0, m], a run works for (m - s)² / 2m seconds on average. m is where
    that is the work divided by the kills; some of it is lost with every kill, so there is work left for the last one.
    """
    begin = time.perf_counter()
    with _start(flags, state) as run:
        while not run.ends_before(POLL_SECONDS) and not _records(state):
            pass
        start = time.perf_counter() - begin
        run.ends_before(None)
    run.check()
    share = (time.perf_counter() - begin - start) / max(kills, 1)
    records = [json.loads(file.read_bytes()) for file in _records(state)]
    outcome.chunks = len(records)
    verdicts = _only(state, "verdicts.csv")
    with open(verdicts, newline="") as file:
        broken_by = [line["broken_by"] for line in csv.DictReader(file)]
    outcome.verdicts, outcome.broken = len(broken_by), sum(b not in ("", "clean") for b in broken_by)
    return verdicts.read_bytes(), start + share + (share**2 + 2 * share * start) ** 0.5


def _records(state: Path) -> list[Path]:
    return sorted(state.rglob("chunks/*.json"))


def _compare(state: Path, known: dict[str, bytes], outcome: Outcome) -> dict[str, bytes]:
    """The records on disk, by name; counts those that are not whole, changed since `known`, or lost."""
    found = {file.name: file.read_bytes() for file in _records(state)}
    outcome.lost += len(known.keys() - found.keys())
    for name, content in found.items():
        outcome.damaged += not _is_whole(content) or known.get(name, content) != content
    return found


def _is_whole(content: bytes) -> bool:
    try:
        return RECORD_KEYS <= json.loads(content).keys()
    except (ValueError, AttributeError):
        return False


def _only(state: Path, name: str) -> Path:
    (file,) = state.rglob(name)
    return file


def evaluation_rows(outcome: Outcome, kills: int) -> list[Row]:
    """The figures of `kill_evaluation`."""
    fruitful = sum(after > before for before, after in zip([0, *outcome.kept], outcome.kept))
    images = f"{outcome.verdicts} images, {outcome.broken} broken"
    note = f"of {outcome.evaluations} evaluations; {images}"
    return [
        row("kills", [outcome.kills], "kills", f"== {kills}", note=f"{fruitful} after new chunks were finished"),
        row("verdicts_different", [outcome.different], "evaluations", "== 0", note=note),
        row("records_damaged", [outcome.damaged], "records", "== 0", note="half-written or changed"),
        row("records_lost", [outcome.lost], "records", "== 0"),
        row("processes_left", [outcome.left_behind], "processes", "== 0", note=f"{PATIENCE:g} s after a kill"),
        row("vanish_seconds", outcome.vanish_seconds, "s", note="until the last process of a killed run has ended"),
        row("chunks", [outcome.chunks], "chunks", note=f"on disk at each kill: {' '.join(map(str, outcome.kept))}"),
    ]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    kills = arguments.kills or (4 if arguments.quick else 20)
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        of = measure_training if arguments.what == "training" else measure_evaluation
        return of(arguments, Path(folder), kills)


def measure_evaluation(arguments: argparse.Namespace, folder: Path, kills: int) -> list[Row]:
    """With a small network for digits."""
    network = arguments.model or train_on_digits(folder, "demo_clean", *TRAINING)
    size = ("--eval.batch_size=1", f"--eval.n_ex={8 if arguments.quick else 48}")
    flags = [f"--eval.model_in={network}", *DIGITS, *size, f"--eval.workers={arguments.workers}"]
    return evaluation_rows(kill_evaluation(flags, folder, kills=kills, seed=arguments.seed), kills)


def measure_training(arguments: argparse.Namespace, folder: Path, kills: int) -> list[Row]:
    """On digits, with each number of processes and the same global batch."""
    rows = []
    for processes in arguments.processes:
        flags = (
            *FLAGS,
            f"--training.batch_size={GLOBAL_BATCH // processes}",
            f"--training.epochs={2 if arguments.quick else 20}",
        )
        outcome = kill_training(
            flags, folder / f"processes_{processes}", processes=processes, kills=kills, seed=arguments.seed
        )
        rows += training_rows(outcome, kills, suffix=f"_{processes}p")
    return rows


def process_counts(text: str) -> list[int]:
    """Numbers from text such as "1,2"; for argparse."""
    counts = [int(number) for number in text.split(",")]
    if any(count < 1 or GLOBAL_BATCH % (2 * count) for count in counts):  # mixup needs even batches
        raise ValueError(text)
    return counts


if __name__ == "__main__":
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("what", choices=["evaluation", "training"], help="what is killed")
    parser.add_argument("--kills", type=int, help="how many (default 20; 4 with --quick)")
    parser.add_argument("--workers", type=int, default=2, help="evaluation: worker processes (default 2)")
    parser.add_argument(
        "--model", type=Path, help="evaluation: run folder or weights of a network for digits; default: train one"
    )
    parser.add_argument(
        "--processes", type=process_counts, default=[1, 2], metavar="N,N", help="training: processes (default 1,2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    sys.exit(main(measure, parser.parse_args()))
