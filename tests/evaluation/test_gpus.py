"""Which devices an evaluation gets, by what a stand-in for nvidia-smi says of the machine's GPUs."""

from __future__ import annotations

import os
import time

import pytest

import evaluation.gpus
from common.errors import UserError
from evaluation.config import EvalAttackConfig
from evaluation.gpus import find_devices, free_gpus

UUIDS = [f"{n}b9d1a2c-0000-1111-2222-{n:012d}" for n in range(4)]  # as PyTorch shows them
# What GPUtil asks for, in this order.
QUERY = (
    "index,uuid,utilization.gpu,memory.total,memory.used,memory.free,driver_version,name,gpu_serial,display_active,"
    "display_mode,temperature.gpu"
)


def line(number, load=0, used=0, total=80000, uuid=None):
    """One GPU in nvidia-smi's words; `load` in percent, memory in MiB."""
    free = total - used if isinstance(used, int) else used
    uuid = uuid or f"GPU-{UUIDS[number]}"
    return f"{number}, {uuid}, {load}, {total}, {used}, {free}, 550.54, NVIDIA H200, 16500, Disabled, Disabled, 31"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Sets what the stand-in prints: the first list of lines at the first call and so on, the last one from then on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "nvidia-smi"

    def prints(*answers, status=0):
        for number, lines in enumerate(answers, start=1):
            (folder / f"answer{number}").write_text("".join(f"{text}\n" for text in lines))
        script.write_text(f"""#!/bin/sh
[ "$1" = "--query-gpu={QUERY}" ] && [ "$2" = "--format=csv,noheader,nounits" ] || exit 99
cd "{folder}"
echo call >> calls
n=$(wc -l < calls)
[ $n -gt {len(answers)} ] && n={len(answers)}
cat answer$((n))
exit {status}
""")
        script.chmod(0o755)

    prints.calls = lambda: len((folder / "calls").read_text().split())
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return prints


@pytest.fixture
def no_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    """No launcher started this process, whatever started the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """Sets the GPUs that PyTorch sees: their numbers on the machine, as CUDA_VISIBLE_DEVICES orders them."""

    def has(*numbers):
        monkeypatch.setattr(evaluation.gpus, "usable_gpus", lambda: len(numbers))
        monkeypatch.setattr(evaluation.gpus, "_uuids", lambda gpus: [UUIDS[numbers[n]] for n in gpus])

    return has


@pytest.fixture
def cores(monkeypatch):
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)), raising=False)


def torchrun(monkeypatch, *, local_rank, world_size=4):
    for name, value in {"RANK": local_rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))


def gpus(*numbers):
    return [f"cuda:{number}" for number in numbers]


# --- What is free ---


@pytest.mark.parametrize(
    ("load", "used", "max_load", "max_memory", "is_free"),
    [
        (0, 0, 0.5, 0.5, True),
        (50, 40000, 0.5, 0.5, True),  # at the limit
        (51, 0, 0.5, 0.5, False),
        (0, 40001, 0.5, 0.5, False),
        (100, 80000, 1.0, 1.0, True),
        (1, 0, 0.0, 0.5, False),
        (0, 1, 0.5, 0.0, False),
        (0, 0, 0.0, 0.0, True),
        (90, 0, 0.95, 0.1, True),
        (0, 60000, 0.1, 0.8, True),
    ],
)
def test_limits(nvidia_smi, load, used, max_load, max_memory, is_free):
    nvidia_smi([line(0, load, used)])
    assert free_gpus(UUIDS[:1], max_load, max_memory) == ([0] if is_free else [])


@pytest.mark.parametrize(
    ("visible", "free"),
    [([0, 1, 2, 3], [0, 2]), ([3, 2, 1, 0], [1, 3]), ([1], []), ([2], [0]), ([1, 2], [1]), ([0, 3], [0]), ([], [])],
)
def test_numbers_are_those_of_pytorch(nvidia_smi, visible, free):
    """GPUs 1 and 3 of the machine are busy, whatever number PyTorch gives them."""
    nvidia_smi([line(0), line(1, load=99), line(2), line(3, used=79000)])
    assert free_gpus([UUIDS[n] for n in visible], 0.5, 0.5) == free


def test_any_spelling_of_a_uuid(nvidia_smi):
    nvidia_smi([line(0, load=99, uuid=f"GPU-{UUIDS[0].upper()}"), line(1, load=99, uuid=UUIDS[1])])
    assert free_gpus([UUIDS[0], f"GPU-{UUIDS[1]}", UUIDS[2]], 0.5, 0.5) == [2]


def test_an_unknown_load_counts_as_free(nvidia_smi):
    nvidia_smi([line(0, load="[N/A]"), line(1, load="[N/A]", used="[N/A]"), line(2, load="[N/A]", used=79000)])
    assert free_gpus(UUIDS, 0.5, 0.5) == [0, 1, 3]  # 2 has no memory left, 3 is not listed


def test_without_nvidia_smi_all_are_free(no_nvidia_smi):
    assert free_gpus(UUIDS, 0.5, 0.5) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "lines",
    [
        ["Failed to initialize NVML: Driver/library version mismatch", "NVML library version: 550.54"],
        ["No devices were found"],
        [line(0, total=0)],
        [line(0), "1, GPU-x"],
    ],
)
def test_when_nvidia_smi_fails_all_are_free(nvidia_smi, capfd, lines):
    nvidia_smi(lines, status=9)
    assert free_gpus(UUIDS, 0.5, 0.5) == [0, 1, 2, 3]
    assert "warning: eval.gpus: nvidia-smi does not report free GPUs" in capfd.readouterr().err


def test_an_nvidia_smi_that_says_nothing(nvidia_smi):
    nvidia_smi([], status=9)
    assert free_gpus(UUIDS, 0.5, 0.5) == [0, 1, 2, 3]


# --- Slots ---


def test_auto_takes_all_free_gpus(nvidia_smi, machine):
    nvidia_smi([line(0), line(1, load=99), line(2), line(3)])
    machine(0, 1, 2, 3)
    assert find_devices(EvalAttackConfig(), chunks=100) == gpus(0, 2, 3)
    assert find_devices(EvalAttackConfig(), chunks=2) == gpus(0, 2)
    machine(3, 1)
    assert find_devices(EvalAttackConfig(), chunks=100) == gpus(0)


def test_limits_are_those_of_the_flags(nvidia_smi, machine):
    nvidia_smi([line(0, load=60), line(1, used=50000), line(2, load=60, used=50000)])
    machine(0, 1, 2)
    assert find_devices(EvalAttackConfig(gpu_max_load=0.7), chunks=9) == gpus(0)
    assert find_devices(EvalAttackConfig(gpu_max_memory=0.7), chunks=9) == gpus(1)
    assert find_devices(EvalAttackConfig(gpu_max_load=0.7, gpu_max_memory=0.7), chunks=9) == gpus(0, 1, 2)


@pytest.mark.parametrize(
    ("asked", "chunks", "slots"),
    [
        ("0,1", 9, [0, 1]),
        ("1", 9, [1]),
        ("2,0", 9, [2, 0]),
        ("2,0,2", 9, [2, 0]),
        ("0,1,2", 2, [0, 1]),
    ],
)
def test_named_gpus_are_taken_busy_or_not(nvidia_smi, machine, asked, chunks, slots):
    nvidia_smi([line(n, load=99, used=79000) for n in range(3)])
    machine(0, 1, 2)
    assert find_devices(EvalAttackConfig(gpus=asked), chunks=chunks) == gpus(*slots)


@pytest.mark.parametrize(("visible", "asked"), [((0, 1), "0,2"), ((0, 1), "2"), ((3, 2), "3"), ((), "0")])
def test_a_gpu_that_is_not_there(machine, visible, asked):
    machine(*visible)
    with pytest.raises(
        UserError, match=rf"^eval\.gpus: expected numbers of the {len(visible)} GPUs .*; got {asked}\.$"
    ):
        find_devices(EvalAttackConfig(gpus=asked), chunks=9)


@pytest.mark.parametrize("visible", [(), (0, 1)])
def test_none_is_the_cpu_although_there_are_gpus(machine, cores, visible):
    machine(*visible)
    cores(2)
    assert find_devices(EvalAttackConfig(gpus="none"), chunks=9) == ["cpu"] * 2


@pytest.mark.parametrize(
    ("workers", "threads", "available", "chunks", "count"),
    [
        (0, 1, 8, 100, 8),
        (0, 2, 8, 100, 4),
        (0, 3, 8, 100, 2),
        (0, 8, 8, 100, 1),
        (0, 16, 8, 100, 1),
        (0, 1, 8, 3, 3),
        (3, 1, 8, 100, 3),
        (3, 4, 8, 100, 3),
        (12, 1, 8, 100, 12),
        (3, 1, 8, 1, 1),
    ],
)
def test_processes_on_the_cpu(machine, cores, workers, threads, available, chunks, count):
    machine()
    cores(available)
    settings = EvalAttackConfig(workers=workers, threads=threads)
    assert find_devices(settings, chunks=chunks) == ["cpu"] * count


# --- Waiting ---


BUSY, FREE = [line(0, load=99), line(1, used=79000)], [line(0, load=99), line(1)]


def test_waits_for_a_free_gpu(nvidia_smi, machine, monkeypatch, capsys):
    monkeypatch.setattr(evaluation.gpus, "GPU_POLL_SECONDS", 0.05)
    nvidia_smi(BUSY, BUSY, BUSY, FREE)
    machine(0, 1)
    assert find_devices(EvalAttackConfig(gpu_wait=1), chunks=9) == gpus(1)
    assert nvidia_smi.calls() == 4
    assert capsys.readouterr().err.count("waiting for a free GPU") == 3


def test_gives_up_waiting(nvidia_smi, machine, monkeypatch):
    monkeypatch.setattr(evaluation.gpus, "GPU_POLL_SECONDS", 0.1)
    nvidia_smi(BUSY)
    machine(0, 1)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^eval\.gpus: none of the 2 GPUs is free .*eval\.gpu_wait"):
        find_devices(EvalAttackConfig(gpu_wait=1 / 60), chunks=9)
    assert 1 <= time.monotonic() - begin < 10
    assert 2 <= nvidia_smi.calls() <= 12


def test_waits_no_longer_than_asked(nvidia_smi, machine):
    """The polling interval may exceed the waiting time; GPUs are checked once more at the end."""
    nvidia_smi(BUSY, FREE)
    machine(0, 1)
    begin = time.monotonic()
    assert find_devices(EvalAttackConfig(gpu_wait=0.3 / 60), chunks=9) == gpus(1)
    assert time.monotonic() - begin < evaluation.gpus.GPU_POLL_SECONDS / 2


def test_does_not_wait_unasked(nvidia_smi, machine, capsys):
    nvidia_smi(BUSY, FREE)
    machine(0, 1)
    with pytest.raises(UserError, match=r"load at most 0\.5, memory in use at most 0\.25.*within 0 minutes"):
        find_devices(EvalAttackConfig(gpu_max_memory=0.25), chunks=9)
    assert nvidia_smi.calls() == 1
    assert "waiting" not in capsys.readouterr().err


# --- Under torchrun ---


@pytest.mark.parametrize("local_rank", [0, 1])
@pytest.mark.parametrize("asked", ["auto", "0"])
def test_torchrun_gives_each_process_its_gpu(nvidia_smi, machine, monkeypatch, local_rank, asked):
    """Busy or not: how many processes there are was for the user to say."""
    nvidia_smi(BUSY)
    machine(0, 1)
    torchrun(monkeypatch, local_rank=local_rank)
    assert find_devices(EvalAttackConfig(gpus=asked), chunks=9) == gpus(local_rank)


def test_torchrun_with_more_processes_than_gpus(machine, monkeypatch):
    machine(0, 1)
    torchrun(monkeypatch, local_rank=2)
    with pytest.raises(UserError, match=r"^torchrun: more processes than GPUs on this machine \(2\).*at most 2\.$"):
        find_devices(EvalAttackConfig(), chunks=9)


@pytest.mark.parametrize(("visible", "asked"), [((), "auto"), ((0, 1), "none")])
def test_torchrun_on_the_cpu(machine, cores, monkeypatch, visible, asked):
    """One worker for each process."""
    machine(*visible)
    cores(8)
    torchrun(monkeypatch, local_rank=3)
    assert find_devices(EvalAttackConfig(gpus=asked, threads=2, workers=5), chunks=9) == ["cpu"]
