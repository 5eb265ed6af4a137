"""The work queue with toy tasks in real worker processes: nothing is lost or done twice, and no worker is left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from common.errors import UserError
from evaluation.workqueue import MOST_FAILURES, TaskFailed, run_tasks

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds; a machine may be busy with other things
LONG = 60  # seconds a task takes that is never to end by itself


# --- What the workers run ---


def setup(slot, folder, handler):
    """Leave this worker's number, its server's and its slot in `folder`; tasks go to `handler(folder, task, note)`."""
    write_whole(folder / f"worker-{os.getpid()}", f"{os.getppid()} {slot}")
    return partial(handler, folder)


def setup_broken(slot, folder, handler):
    setup(slot, folder, handler)
    raise RuntimeError("no such device")


def setup_bad_input(slot, folder, handler):
    setup(slot, folder, handler)
    raise UserError("eval.model_in: no such file.")


def setup_broken_once(slot, folder, handler):
    """The first worker of all cannot start."""
    if attempt(folder, "setup") == 1:
        raise RuntimeError("no such device")
    return setup(slot, folder, handler)


def setup_of_slot(slot, folder, handler):
    """One of the devices is broken."""
    return setup_broken(slot, folder, handler) if slot == "broken" else setup(slot, folder, handler)


def setup_failing_slot(slot, folder, handler):
    """One of the devices starts, and fails at every task."""
    return setup(slot, folder, broken if slot == "broken" else handler)


def broken(folder, task, note):
    attempt(folder, "broken")
    raise RuntimeError("uncorrectable memory error")


def square_after_the_broken_ones(folder, task, note):
    """The device that fails has had all its tries."""
    wait_until(lambda: (folder / "attempts-broken").exists() and len(attempts(folder, "broken")) == MOST_FAILURES)
    return square(folder, task, note)


def square(folder, task, note):
    attempt(folder, task)
    return task * task, os.getpid()


def slowly(folder, task, note):
    time.sleep(0.2)
    return square(folder, task, note)


def fail_once(folder, task, note):
    if attempt(folder, task) == 1 and task == 2:
        raise ValueError("the first try fails")
    return task * task, os.getpid()


def fail_together(folder, task, note):
    """Both first attempts fail, each in a separate worker."""
    if attempt(folder, task) == 1:
        wait_until(lambda: len(list(folder.glob("attempts-*"))) == 2)
        raise ValueError("the first try fails")
    return task * task, os.getpid()


def die_once(folder, task, note):
    if attempt(folder, task) == 1 and task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task, os.getpid()


def die_alone(folder, task, note):
    """Die at the first try, when every other worker has gone home."""
    if attempt(folder, task) == 1:
        wait_until(lambda: len(workers(folder)) == 2 and living(folder) == [os.getpid()])
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task, os.getpid()


def die_speaking(folder, task, note):
    """Die at the first try in the middle of a message that is too long for the pipe."""
    if attempt(folder, task) == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        note("look away")
        return bytes(2**26)
    return task * task, os.getpid()


def unpicklable_once(folder, task, note):
    return (task * task, os.getpid()) if attempt(folder, task) > 1 else lambda: task


def fail(folder, task, note):
    attempt(folder, task)
    raise ValueError("this chunk is broken")


def die(folder, task, note):
    attempt(folder, task)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(folder, task, note):
    attempt(folder, task)
    sys.exit(3)


def bad_input(folder, task, note):
    if attempt(folder, task) and task == 0:
        wait_until(lambda: (folder / "asleep-1").exists())
        raise UserError("data.val_dataset: changed meanwhile.")
    sleep(folder, task, note)


def report(folder, task, note):
    note(f"{task} begun")
    note(f"{task} half done")
    return task * task, os.getpid()


def sleep(folder, task, note):
    write_whole(folder / f"asleep-{task}", "")
    time.sleep(LONG)


# --- What they leave behind ---


def attempt(folder, task):
    """Note that this worker tries `task`; returns how many have."""
    with open(folder / f"attempts-{task}", "a+") as file:
        file.write(f"{os.getpid()}\n")
        file.flush()
        file.seek(0)
        return len(file.readlines())


def attempts(folder, task):
    """The workers that have tried `task`."""
    return [int(line) for line in (folder / f"attempts-{task}").read_text().split()]


def write_whole(path, text):
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


def workers(folder):
    """All that ever started."""
    return [int(file.name.partition("-")[2]) for file in folder.glob("worker-*")]


def living(folder):
    return [pid for pid in workers(folder) if is_alive(pid)]


def is_alive(pid):
    try:
        os.kill(pid, 0)
        # A process that has ended but that nobody has asked for is still listed.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # just gone, or a system without /proc
        return not Path("/proc/self").exists()


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path):
    """Where workers leave their traces; afterwards none of them may be running."""
    before = multiprocessing.active_children()  # of other tests, such as loader workers that stay
    yield tmp_path
    assert living(tmp_path) == []
    assert set(multiprocessing.active_children()) <= set(before)


class Work:
    """What came of the tasks 0 … n−1."""

    def __init__(self):
        self.results, self.notes, self.failures, self.events = [], [], [], []

    def do(self, folder, handler, *, n=5, slots=(0, 1), setup=setup, tick=lambda: True, on_note=lambda text: None):
        tasks = iter(range(n))
        end = time.monotonic() + PATIENCE

        def patient_tick():
            assert time.monotonic() < end, "the work does not end"
            return tick()

        events = run_tasks(lambda: next(tasks, None), slots=slots, setup=setup, arguments=(folder, handler))
        with closing(events):
            for kind, task, content in events:
                if kind == "tick" and not patient_tick():
                    break
                if kind == "failed":
                    self.failures.append((task, content))
                if kind == "note":
                    self.notes.append((task, content))
                    self.events.append(task)
                    on_note(content)
                if kind == "result":
                    self.results.append((task, content[0]))
                    self.events.append(task)
                    self.finished_by = content[1]
        return self


def squares(n):
    return [(task, task * task) for task in range(n)]


# --- Tests ---


@pytest.mark.parametrize(("n", "slots"), [(0, 1), (1, 1), (5, 1), (5, 2), (12, 4), (1, 3)])
def test_every_task_is_done_once(folder, n, slots):
    work = Work().do(folder, square, n=n, slots=range(slots))
    assert sorted(work.results) == squares(n)
    assert [len(attempts(folder, task)) for task in range(n)] == [1] * n
    assert work.failures == work.notes == []


def test_every_worker_has_its_slot(folder):
    started = partial(wait_until, lambda: len(workers(folder)) == 3)
    Work().do(folder, report, slots=("a", "b", "c"), on_note=lambda text: started())
    assert sorted(file.read_text().split()[1] for file in folder.glob("worker-*")) == ["a", "b", "c"]


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    ("handler", "why"),
    [(fail_once, "ValueError: the first try fails\nTraceback"), (die_once, "killed by SIGKILL (the system does that")],
)
def test_a_failed_task_is_given_to_another_worker(folder, handler, why, slots):
    work = Work().do(folder, handler, slots=range(slots))
    assert sorted(work.results) == squares(5)
    [(task, reason)] = work.failures
    assert task == 2 and why in reason
    first, second = attempts(folder, 2)
    assert first != second
    assert [len(attempts(folder, task)) for task in (0, 1, 3, 4)] == [1] * 4


def test_another_worker_has_the_slot_of_the_failed_one(folder):
    work = Work().do(folder, fail_together, n=2, slots=("a", "b"))
    assert sorted(work.results) == squares(2)
    assert sorted(file.read_text().split()[1] for file in folder.glob("worker-*")) == ["a", "a", "b", "b"]


def test_another_worker_starts_where_none_is_left(folder):
    """A worker dies at the last task, after the others found no more and ended."""
    work = Work().do(folder, die_alone, n=1)
    assert work.results == squares(1)
    assert len(workers(folder)) == 3
    assert attempts(folder, 0)[1] == work.finished_by


def test_a_worker_that_dies_in_the_middle_of_a_message(folder):
    def look_away(text):  # so that the message fills the pipe, and ends with its sender
        wait_until(lambda: not is_alive(attempts(folder, 0)[0]))

    work = Work().do(folder, die_speaking, n=1, slots=[0], on_note=look_away)
    assert work.results == squares(1)
    assert len(work.failures) == 1 and "SIGKILL" in work.failures[0][1]


def test_a_result_that_cannot_be_sent(folder):
    work = Work().do(folder, unpicklable_once, n=1)
    assert work.results == squares(1)
    assert "pickle" in work.failures[0][1]


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (fail, "ValueError: this chunk is broken"),
        (die, "its worker was killed by SIGKILL"),
        (leave, "its worker exited with status 3"),
    ],
)
def test_a_task_that_always_fails(folder, handler, why):
    work = Work()
    with pytest.raises(TaskFailed, match=rf"^0 failed 3 times; the last time: {why}"):
        work.do(folder, handler, n=1)
    assert len(attempts(folder, 0)) == MOST_FAILURES == 3
    assert [task for task, _ in work.failures] == [0, 0]  # given back twice
    assert work.results == []


def test_failures_are_counted_by_task(folder):
    """Three tasks that each fail once are no reason to give up."""
    work = Work().do(folder, unpicklable_once, n=4)
    assert sorted(work.results) == squares(4)
    assert sorted(task for task, _ in work.failures) == [0, 1, 2, 3]


def test_workers_that_cannot_start(folder):
    work = Work()
    with pytest.raises(
        TaskFailed, match="^workers could not start 3 times; the last time: RuntimeError: no such device"
    ):
        work.do(folder, square, slots=[0], setup=setup_broken)
    assert len(workers(folder)) == 3
    assert [task for task, _ in work.failures] == [None] * 3 and work.results == []


def test_a_worker_that_starts_at_the_second_try(folder):
    work = Work().do(folder, square, slots=[0], setup=setup_broken_once)
    assert sorted(work.results) == squares(5)
    assert [task for task, _ in work.failures] == [None]


def test_a_broken_device_leaves_the_work_to_the_others(folder):
    work = Work().do(folder, slowly, slots=["good", "broken"], setup=setup_of_slot, n=8)
    assert sorted(work.results) == squares(8)
    assert [task for task, _ in work.failures] == [None] * 3


def test_workers_that_cannot_start_any_more_do_not_matter_when_all_is_done(folder):
    """The good device has done everything before the other one has failed for the last time."""
    work = Work().do(folder, square, slots=["good", "broken"], setup=setup_of_slot, n=1)
    assert work.results == squares(1) and all(task is None for task, _ in work.failures)


def test_a_device_that_fails_at_its_tasks_is_given_up(folder):
    """What failed there goes to the other one first."""
    work = Work().do(folder, square_after_the_broken_ones, slots=["good", "broken"], setup=setup_failing_slot, n=12)
    assert sorted(work.results) == squares(12)
    failed = [task for task, _ in work.failures]
    assert len(failed) == 3 == len(set(failed))


def test_alike_slots_are_told_apart(folder):
    work = Work().do(folder, fail_once, slots=["cpu", "cpu"], n=6)
    assert sorted(work.results) == squares(6) and len(work.failures) == 1


def test_bad_input_ends_all_at_once(folder):
    work = Work()
    with pytest.raises(UserError, match=r"^data\.val_dataset: changed meanwhile\.$"):
        work.do(folder, bad_input)
    assert len(attempts(folder, 0)) == 1
    assert work.failures == work.results == []


def test_bad_input_while_a_worker_starts(folder):
    with pytest.raises(UserError, match=r"^eval\.model_in: no such file\.$"):
        Work().do(folder, square, slots=[0], setup=setup_bad_input)
    assert len(workers(folder)) == 1


def test_notes_arrive_in_order_before_the_result(folder):
    work = Work().do(folder, report, n=4)
    for task in range(4):
        assert [text for t, text in work.notes if t == task] == [f"{task} begun", f"{task} half done"]
        assert work.events.count(task) == 3
    assert sorted(work.results) == squares(4)
    assert Work().do(folder, report, n=2, slots=[0]).events == [0, 0, 0, 1, 1, 1]


def test_tick_ends_all(folder):
    """It is called although no worker says anything."""

    def both_asleep():
        return len(list(folder.glob("asleep-*"))) == 2

    work = Work().do(folder, sleep, tick=lambda: not both_asleep())
    assert both_asleep() and len(workers(folder)) == 2
    assert work.results == work.failures == []


def test_tick_false_at_once(folder):
    assert Work().do(folder, square, tick=lambda: False).results == []


def test_an_error_while_workers_start_ends_those_that_did(folder):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        Work().do(folder, sleep, slots=[0, lambda: "not to be pickled"])


def test_an_error_of_the_caller_ends_all(folder):
    def refuse(text):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Work().do(folder, report, on_note=refuse)
    assert workers(folder)


PARENT = """
import signal, sys
from pathlib import Path
from tests.evaluation.test_workqueue import Work, sleep

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    Work().do(Path(sys.argv[1]), sleep)
"""


@pytest.mark.parametrize(
    ("number", "send", "status"),
    [
        (signal.SIGKILL, os.kill, -signal.SIGKILL),
        (signal.SIGTERM, os.kill, 128 + signal.SIGTERM),
        (signal.SIGINT, os.killpg, -signal.SIGINT),  # Ctrl-C reaches all processes of the terminal
    ],
)
def test_workers_end_with_their_parent(folder, number, send, status):
    script = folder / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: parent.poll() is not None or len(list(folder.glob("asleep-*"))) == 2)
        servers = {int(file.read_text().split()[0]) for file in folder.glob("worker-*")}
        assert len(living(folder)) == 2 and len(servers) == 1
        send(parent.pid, number)
        assert parent.wait(PATIENCE) == status
        wait_until(lambda: not living(folder) and not any(map(is_alive, servers)))
        error = parent.stderr.read()
        # Only the parent itself may complain.
        assert error.count("Traceback") == (number == signal.SIGINT), error
    finally:
        parent.kill()
        parent.wait()
        parent.stderr.close()
