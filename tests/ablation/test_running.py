"""Scheduling with stubs of train.py and runner_aa_eval.py, and a small grid with the real programs."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import ablation.running
import runner_aa_eval
import train
from ablation.__main__ import main, make_slots
from ablation.grid import Grid, load_grid
from ablation.results import metric_names, read_results, read_trainings
from ablation.running import Place, Runner, is_finished, read_record
from common.files import take_folder
from common.provenance import PROJECT
from tests.evaluation.helpers import shorten_evaluations
from tests.training.helpers import base_flags
from training.stop import STOPPED

TRAIN = {"data": {"train_dataset": "digits", "val_dataset": "digits", "num_workers": 0, "in_memory": 0}}
# The stubs write what the runner relies on: status file, weights, summary and exit status. `misc.notes` selects the outcome.
STAND_IN_TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {project!r})
from common.flags import load_config
from training.config import TrainConfig
config = load_config(TrainConfig, sys.argv[1:])
folder, notes = config.run_folder, config.misc.notes
folder.mkdir(parents=True, exist_ok=True)
def log(what):
    with open({calls!r}, "a") as file:
        file.write(json.dumps([what, notes, config.data.seed, time.time(), os.environ["CUDA_VISIBLE_DEVICES"]]) + "\\n")
def status(text):
    (folder / "status.json").write_text(json.dumps({{"status": text}}))
def stop(*_):
    status("stopped")
    log("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
log("start")
if config.model.ckpt_path:
    assert (Path(config.model.ckpt_path) / "weights_100.pt").exists()
if notes == "fail":
    sys.exit("error: the disk is full")
if notes == "diverge":
    status("diverged")
    sys.exit(3)
if notes == "asked":
    stop()
time.sleep(60 if notes == "slow" else 0.3)
(folder / "weights_100.pt").touch()
status("finished")
log("end")
"""
STAND_IN_EVAL = """
import json, sys
from pathlib import Path
out = Path(next(a for a in sys.argv if a.startswith("--eval.out=")).partition("=")[2])
out.mkdir(parents=True)
if "--eval.seed=13" in sys.argv:
    sys.exit("error: no such attack")
(out / "summary.json").write_text(json.dumps({"evaluations": [], "argv": sys.argv}))
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the stubs and return the file that records their calls."""
    folder, calls = tmp_path / "programs", tmp_path / "calls"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN_TRAIN.format(project=str(PROJECT), calls=str(calls)))
    (folder / "runner_aa_eval.py").write_text(STAND_IN_EVAL)
    monkeypatch.setattr(ablation.running, "PROJECT", folder)
    return calls


def grid_of(tmp_path: Path, arms: dict, seeds=(0,), **content) -> Grid:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"train": TRAIN, "arms": arms, "seeds": list(seeds), **content}, sort_keys=False))
    return load_grid(path, out=tmp_path / "out")


def work(grid: Grid, *slots: Place) -> int:
    return Runner(grid.cells, slots or [Place("", 1)], on_change=lambda: None).run()


def calls_of(file: Path, what: str = "start") -> list[list]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [call for call in map(json.loads, lines) if call[0] == what]


def test_runs_spread_over_gpus_start_after_what_they_need_and_are_skipped_when_finished(tmp_path, programs) -> None:
    arms = {"robust": {"from": "clean", "misc.notes": "robust"}, "clean": {"misc.notes": "clean", "evaluate": False}}
    grid = grid_of(tmp_path, arms, seeds=(0, 1))
    assert work(grid, Place("4", 1), Place("7", 1)) == 0
    assert all(is_finished(cell) for cell in grid.cells)
    starts, ends = calls_of(programs), calls_of(programs, "end")
    assert sorted(call[1:3] for call in starts) == [["clean", 0], ["clean", 1], ["robust", 0], ["robust", 1]]
    assert {call[4] for call in starts} == {"4", "7"}
    assert starts[1][3] < ends[0][3], "two slots, but runs are not parallel"
    evaluation = json.loads(next((tmp_path / "out/robust/seed0").glob("eval_robust_*/summary.json")).read_text())[
        "argv"
    ]
    assert "--eval.gpus=0" in evaluation
    assert work(grid, Place("", 1)) == 0 and len(calls_of(programs)) == 4


def test_failures_are_recorded_with_their_reason_and_stop_nothing_else(tmp_path, programs) -> None:
    arms = {
        "bad": {"misc.notes": "fail"},
        "child": {"from": "bad"},
        "diverging": {"misc.notes": "diverge"},
        "fine": {},
        "unknown": {"evaluate": {"eval.seed": 13}},
    }
    grid = grid_of(tmp_path, arms)
    assert work(grid) == 1
    found = {result.entry.name: (result.status, result.notes) for result in read_results(grid)}
    assert found["bad"] == ("failed", ["training: status 1: the disk is full"])
    assert found["child"] == ("not run", ["training: bad, seed 0 did not finish"])
    assert found["diverging"][0] == "diverged"
    assert found["unknown"] == ("failed", ["evaluation: status 1: no such attack"])
    assert is_finished(grid.cell("fine", 0))
    before = len(calls_of(programs))
    assert work(grid) == 1
    assert [call[1] for call in calls_of(programs)[before:]] == ["fail"], (
        "only failures that may succeed later are tried again"
    )


def test_two_programs_share_a_grid(tmp_path, programs) -> None:
    grid = grid_of(tmp_path, {"a": {"misc.notes": "a"}, "b": {"misc.notes": "b"}}, seeds=(0, 1))
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(work(grid))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [0, 0]
    assert sorted(call[1:3] for call in calls_of(programs)) == [["a", 0], ["a", 1], ["b", 0], ["b", 1]]


def test_a_locked_cell_is_not_started(tmp_path, programs) -> None:
    grid = grid_of(tmp_path, {"a": {"misc.notes": "a"}})
    (cell,) = grid.cells
    cell.folder.mkdir(parents=True)
    lock = take_folder(cell.folder)
    runner, statuses = Runner(grid.cells, [Place("", 1)], on_change=lambda: None), []
    thread = threading.Thread(target=lambda: statuses.append(runner.run()))
    thread.start()
    time.sleep(0.5)
    assert not calls_of(programs)
    lock.close()
    thread.join(60)
    assert statuses == [0] and len(calls_of(programs)) == 1


def test_stopping_ends_running_programs_and_starts_no_others(tmp_path, programs) -> None:
    grid = grid_of(tmp_path, {"a": {"misc.notes": "slow"}, "b": {}})
    runner = Runner(grid.cells, [Place("", 1)], on_change=lambda: None)

    def stop_when_started() -> None:
        while not calls_of(programs):
            time.sleep(0.05)
        runner.stop()

    threading.Thread(target=stop_when_started).start()
    assert runner.run() == STOPPED
    assert [call[1] for call in calls_of(programs, "stopped")] == ["slow"] and len(calls_of(programs)) == 1
    assert read_record(grid.cells[0])["stages"]["train"]["status"] == "stopped"


def test_a_run_that_was_asked_to_stop_stops_the_grid(tmp_path, programs) -> None:
    grid = grid_of(tmp_path, {"a": {"misc.notes": "asked"}, "b": {}})
    assert work(grid) == STOPPED and len(calls_of(programs)) == 1


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.gpus.usable_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,9")  # GPU 9 does not exist
    assert [slot.gpu for slot in make_slots(5, 1)] == ["3", "5", "3", "5", "3"]
    assert len(make_slots(None, None)) == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot.gpu for slot in make_slots(None, 1)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b,MIG-c")  # a process sees only one of them
    assert [slot.gpu for slot in make_slots(None, 1)] == ["MIG-a", "MIG-b", "MIG-c"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b, GPU-typo")
    assert [slot.gpu for slot in make_slots(None, 1)] == ["GPU-a", "GPU-b"]
    monkeypatch.setattr("common.gpus.usable_gpus", lambda: 0)
    assert make_slots(3, 1) == [Place("", 1)] * 3


def test_signals_stop_the_runner_and_set_the_exit_status(tmp_path, programs) -> None:
    grid_of(tmp_path, {"a": {"misc.notes": "slow"}})
    before = signal.getsignal(signal.SIGTERM)

    def send_when_started() -> None:
        while not calls_of(programs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_when_started).start()
    assert main([str(tmp_path / "grid.yaml"), f"--out={tmp_path / 'out'}", "--jobs=1"]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [call[1] for call in calls_of(programs, "stopped")] == ["slow"]


def work_here(grid: Grid, patch: pytest.MonkeyPatch) -> int:
    """Like `work`, but run train.py and runner_aa_eval.py in this process, which already has their imports.

    Their signal handlers need the main thread, so the runner gets another one.
    """
    programs = {"train.py": train.main, "runner_aa_eval.py": runner_aa_eval.main}
    calls: queue.Queue[Call | None] = queue.Queue()

    class Call:
        """Replacement of subprocess.Popen."""

        def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
            (self.program, *self.argv), self.threads, self.status = command[1:], env["OMP_NUM_THREADS"], Future()
            calls.put(self)

        def wait(self) -> int:
            return self.status.result()

    patch.setattr(ablation.running, "subprocess", SimpleNamespace(Popen=Call, DEVNULL=None))
    with ThreadPoolExecutor(1) as pool:
        runner = pool.submit(work, grid)
        runner.add_done_callback(lambda _: calls.put(None))
        while (call := calls.get()) is not None:
            torch.set_num_threads(int(call.threads))
            try:
                call.status.set_result(programs[Path(call.program).name](call.argv))
            except BaseException as error:
                call.status.set_exception(error)
    return runner.result()


@pytest.fixture(scope="module", params=["here", pytest.param("started", marks=pytest.mark.slow)])
def real(request, images, tmp_path_factory) -> tuple[Path, Path]:
    """Run a grid of one run with the real programs on tiny images."""
    folder = tmp_path_factory.mktemp("real")
    flags = {name: str(value) for name, value in base_flags(images, folder).items() if name != "logging.folder"}
    grid = {
        "train": flags | {"training.resume": "auto", "validation.adv_n_ex": "4"},
        "arms": {"robust": {"adv.attack": "apgd", "adv.eps": 0.05}},
        "seeds": [0],
        "evaluate": {"eval.fullaa": 0, "eval.eps": 0.02, "eval.n_ex": 4, "eval.img_size": 32, "eval.crop_pct": 1},
    }
    path, out = folder / "grid.yaml", folder / "out"
    path.write_text(yaml.safe_dump(grid))
    if request.param == "started":
        assert main([str(path), f"--out={out}", "--threads=1"]) == 0
    else:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            shorten_evaluations(patch)
            assert work_here(load_grid(path, out=out), patch) == 0
        torch.set_num_threads(threads)
    return path, out


def test_a_real_grid(real) -> None:
    path, out = real
    (result,) = read_results(load_grid(path, out=out))
    assert result.status == "finished"
    assert set(result.metrics) == {"clean, all images", "Linf 0.05, APGD-10", "clean", "Linf 0.02"}
    assert set(metric_names(load_grid(path, out=out).cells[0], result.entry)) == set(result.metrics)
    robust = result.metrics["Linf 0.02"]
    report = json.loads(next(out.rglob("report.json")).read_text())
    assert (robust.share, robust.n) == (report["robust_acc"], 4)
    assert robust.images.mean() == pytest.approx(robust.share) and len(robust.images) == 4
    assert result.seconds["training"] > 0 and result.seconds["evaluation"] > 0
    assert [provenance["threads"] for provenance in result.provenance] == [1]
    (training,) = read_trainings(load_grid(path, out=out))
    assert training.seconds == result.seconds["training"] and training.provenance["threads"] == 1


def test_summary_alone_runs_nothing(real, capsys) -> None:
    path, out = real
    times = {
        file: os.stat(file).st_mtime_ns for file in out.rglob("*") if file.is_file() and "summary" not in file.name
    }
    assert main([str(path), f"--out={out}", "--summary"]) == 0
    assert "| robust | 1/1" in capsys.readouterr().out
    assert {file: os.stat(file).st_mtime_ns for file in times} == times
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
