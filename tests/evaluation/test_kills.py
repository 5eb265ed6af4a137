"""An evaluation that is killed at random moments, and started again, ends in the same verdicts."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from evaluation.records import RECORD_KEYS
from tests.helpers.killing import Program, kill_and_go_on, random_moments
from tests.helpers.processes import wait_until
from tests.training.helpers import base_flags, run, write_images

KILLS, CHUNKS = 20, 40  # of one image each


@dataclass
class Evaluation:
    """A command with two workers, and the records written at the last check."""

    network: Path
    images: Path
    out: Path
    records: dict[str, bytes] = field(default_factory=dict)

    def start(self) -> Program:
        flags = {
            "eval.model_in": self.network,
            "data.val_dataset": self.images,
            "data.num_workers": 0,
            "eval.norms": "Linf",
            "eval.eps": 0.25,
            "eval.fullaa": 0,
            "eval.batch_size": 1,
            "eval.n_ex": CHUNKS,
            "eval.img_size": 32,
            "eval.crop_pct": 1,
            "eval.workers": 2,
            "eval.gpus": "none",
            "eval.out": self.out,
        }
        return Program("runner_aa_eval.py", *(f"--{name}={value}" for name, value in flags.items()))

    def files(self) -> list[Path]:
        return list(self.out.rglob("chunks/*.json"))

    def progress(self, program: Program) -> int:
        """Number of records; -1 before this start has written one."""
        files = self.files()
        return len(files) if any(file.stat().st_mtime > program.started for file in files) else -1

    def check_records(self) -> None:
        """All records are complete; those of the last check exist and are unchanged."""
        found = {file.name: file.read_bytes() for file in self.files()}
        assert all(RECORD_KEYS <= json.loads(content).keys() for content in found.values())
        assert self.records.items() <= found.items()
        self.records = found

    def verdicts(self) -> bytes:
        (file,) = self.out.rglob("verdicts.csv")
        return file.read_bytes()


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    images = write_images(tmp_path / "images", val_images=CHUNKS // 4)
    network = run(base_flags(images, tmp_path / "runs") | {"training.epochs": 4}).folder
    undisturbed, killed = (Evaluation(network, images, tmp_path / name) for name in ("undisturbed", "killed"))
    with undisturbed.start() as program:
        wait_until(lambda: program.ended() or undisturbed.progress(program) > 0)
        start_seconds = time.time() - program.started
        program.wait()
        chunk_seconds = (time.time() - program.started - start_seconds) / CHUNKS
    broken = [line["broken_by"] for line in csv.DictReader(undisturbed.verdicts().decode().splitlines())]
    assert len(broken) == CHUNKS and len(set(broken)) > 1  # the comparison means something
    moments = random_moments(KILLS, start_seconds=start_seconds, progress=CHUNKS - 8, seconds=chunk_seconds, seed=0)
    kill_and_go_on(killed.start, moments, progress=killed.progress, check=killed.check_records)
    assert killed.records
    killed.check_records()
    assert len(killed.records) == CHUNKS
    assert killed.verdicts() == undisturbed.verdicts()
    assert list(killed.out.rglob("*.part")) == []
