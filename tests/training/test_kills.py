"""A training run that is killed at random moments, and started again, ends like one that is left alone, to the last bit."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from common.files import damaged_record
from common.flags import load_config
from tests.helpers.killing import Program, kill_and_go_on, random_moments
from tests.helpers.processes import free_port, wait_until
from tests.training.helpers import base_flags, read_outcome, run, write_images
from training.checkpoint import LAST, PREVIOUS
from training.config import TrainConfig
from training.status import STATUS, read_status

KILLS = 20
TIMINGS = ("seconds", "per_second", "data_wait")  # ends of the names of values that may differ


@dataclass
class Training:
    """A command with all that is random, and frequent states."""

    images: Path
    folder: Path
    epochs: int
    processes: int = 1
    newest: int = 0  # step of the newest state that a kill left

    def flags(self, workers: int = 0) -> dict[str, Any]:
        """Loader workers and port may be others at every start."""
        flags = base_flags(self.images, self.folder) | {
            "model.not_original": 1,
            "model.drop_path": 0.1,
            "model.model_ema": 1,
            "data.augmentations": 1,
            "data.num_workers": workers,
            "training.batch_size": 8 // self.processes,
            "training.epochs": self.epochs,
            "training.resume": "auto",
            "adv.attack": "apgd",
            "adv.eps": 0.05,
            "validation.freq": self.epochs // 2,
            "logging.save_freq": self.epochs // 2,
            "logging.ckpt_minutes": 0.01,
            "logging.ckpt_steps": 4,
        }
        if self.processes > 1:
            flags |= {"training.distributed": 1, "dist.world_size": self.processes, "dist.port": free_port()}
        return flags

    def start(self, workers: int = 0) -> Program:
        return Program("train.py", *(f"--{name}={value}" for name, value in self.flags(workers).items()))

    @property
    def run_folder(self) -> Path:
        return load_config(TrainConfig, [f"--{name}={value}" for name, value in self.flags().items()]).run_folder

    def progress(self, program: Program) -> int:
        """Step of the newest state; -1 before this start trains."""
        status = self.run_folder / STATUS
        if not status.exists() or status.stat().st_mtime <= program.started:
            return -1
        return read_status(self.run_folder)["step"]

    def check_states(self) -> None:
        """Both states are whole, and the newest is not older than before."""
        steps = [0]
        for file in (self.run_folder / name for name in (LAST, PREVIOUS)):
            if file.exists():
                with ZipFile(file) as archive:  # torch.load checks no checksum
                    assert damaged_record(archive) is None
                steps.append(torch.load(file, weights_only=True)["step"])
        assert max(steps) >= self.newest
        self.newest = max(steps)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


def without_timings(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if not name.endswith(TIMINGS)} for record in log]


def assert_same(found: Path, expected: Path, *, steps: int) -> None:
    """Two run folders hold the same weights, raw and averaged, and the same log, with each step once."""
    names = {file.name for file in expected.glob("weights*.pt")}
    assert len(names) >= 4 and names == {file.name for file in found.glob("weights*.pt")}
    for name in names:
        mine, theirs = (torch.load(folder / name, weights_only=True) for folder in (found, expected))
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if bits(mine[key]) != bits(theirs[key])] == [], name
    outcome = read_outcome(found)
    assert [record["step"] for record in outcome.steps] == list(range(1, steps + 1))
    assert without_timings(outcome.log) == without_timings(read_outcome(expected).log)
    assert list(found.glob(".*.part")) == []


@pytest.fixture
def one_thread():
    """As in the programs: the last bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_once(images, tmp_path, one_thread):
    """Only the start that is killed is a separate program."""
    undisturbed, killed = (Training(images, tmp_path / name, epochs=4) for name in ("undisturbed", "killed"))
    assert run(undisturbed.flags()).status == 0
    with killed.start() as program:
        wait_until(lambda: program.ended() or killed.progress(program) >= 4)
        program.kill()
    killed.check_states()
    assert 4 <= killed.newest < 12
    assert run(killed.flags()).status == 0
    assert_same(killed.run_folder, undisturbed.run_folder, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again(tmp_path, processes):
    """With several processes it hits the main process and each rank in turn."""
    images, epochs = write_images(tmp_path / "images", train_images=24), 24
    undisturbed, killed = (Training(images, tmp_path / n, epochs, processes) for n in ("undisturbed", "killed"))
    with undisturbed.start() as program:
        wait_until(lambda: program.ended() or undisturbed.progress(program) >= 0)
        start_seconds = time.time() - program.started
        program.wait()
    steps = 12 * epochs
    moments = random_moments(KILLS, start_seconds=start_seconds, progress=steps - 30, seconds=0.3, seed=processes)
    workers = random.Random(processes)
    kill_and_go_on(
        lambda: killed.start(workers.choice((0, 2)) if processes == 1 else 0),
        moments,
        progress=killed.progress,
        check=killed.check_states,
        in_turn=processes > 1,
    )
    assert killed.newest > 0
    assert_same(killed.run_folder, undisturbed.run_folder, steps=steps)
