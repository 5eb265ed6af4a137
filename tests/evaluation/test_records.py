"""The state folder: what is written is read again, what is damaged is done again, and nobody else's work is touched."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from evaluation.records import SHOWN_DIFFERENCES, StateFolder

CHUNKS = 200_000
ROOT = Path(__file__).resolve().parents[2]
IDENTITY = {
    "network": {"sha256": "c0ffee", "arch": "convnext_micro", "not_original": True},
    "data": {"images": "abc", "n": 20},
    "norm": "Linf",
    "eps": 4 / 255,
    "attacks": ["apgd-ce", "square"],
    "class_names": None,
}


def record(chunk, n=4):
    return {
        "chunk": chunk,
        "positions": list(range(n * chunk, n * chunk + n)),
        "labels": [0, 1, 2, 3],
        "clean_pred": [0, 1, 2, 2],
        "broken_by": ["", "apgd-ce", "", "clean"],
        "images_kept": 0,
        "unreadable": [],
        "rejoined": 0,
        "check": None,
        "started": 0.5,
        "device": "cpu",
        "seconds": 1.25 + chunk,
        "attack_seconds": {"apgd-ce": 0.1 + 0.2},  # a number without a short decimal form
    }


@pytest.fixture
def opened(tmp_path):
    """Opens the folder `tmp_path/state` as often as asked; all are closed afterwards."""
    states = []

    def open_state(identity=IDENTITY, folder=tmp_path / "state"):
        state = StateFolder(folder)
        states.append(state)
        state.open(identity)
        return state

    yield open_state
    for state in states:
        state.close()


def again(state, opened):
    """The same folder in the next run."""
    state.close()
    return opened()


def changed(**paths):
    """IDENTITY with other values; `network__arch` stands for network.arch."""
    identity = copy.deepcopy(IDENTITY)
    for path, value in paths.items():
        *parents, name = path.split("__")
        branch = identity
        for parent in parents:
            branch = branch[parent]
        branch[name] = value
    return identity


def test_a_new_folder_is_empty(opened, tmp_path):
    assert opened().read(CHUNKS) == {}
    assert json.loads((tmp_path / "state" / "identity.json").read_text()) == IDENTITY


def test_records_come_back_exactly(opened):
    state = opened()
    for chunk in (3, 0, 100_000):
        state.write(record(chunk))
    assert (
        state.read(CHUNKS) == again(state, opened).read(CHUNKS) == {chunk: record(chunk) for chunk in (0, 3, 100_000)}
    )


def test_a_chunk_that_the_evaluation_does_not_have_is_no_record(opened, capsys):
    state = opened()
    for chunk in (1, 2):
        state.write(record(chunk))
    assert state.read(2) == {1: record(1)} and "00002.json is damaged" in capsys.readouterr().err


def test_a_file_system_without_locks_is_used_with_a_warning(opened, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    opened().write(record(0))
    assert "cannot be locked" in capsys.readouterr().err


def test_files_are_where_readers_look_for_them(opened, tmp_path):
    state = opened()
    state.write(record(12))
    assert json.loads((tmp_path / "state/chunks/00012.json").read_text()) == record(12)
    assert state.images_file(12) == tmp_path / "state/chunks/00012.npz"


def test_images_are_no_records(opened):
    state = opened()
    state.images_file(0).write_bytes(b"images")
    assert again(state, opened).read(CHUNKS) == {}
    assert state.images_file(0).read_bytes() == b"images"


@pytest.mark.parametrize(
    ("other", "differs", "same"),
    [
        (changed(eps=8 / 255), ["eps: 0.01568"], ["norm", "network", "data", "attacks"]),
        (
            changed(network__sha256="beef"),
            ["network.sha256: c0ffee there, beef here"],
            ["network.arch", "data.", "eps"],
        ),
        (
            changed(network__arch="vit_s", data__n=40),
            ["network.arch: convnext_micro there, vit_s here", "data.n: 20 there, 40 here"],
            ["sha256", "data.images", "not_original", "class_names"],
        ),
        (changed(attacks=["apgd-ce"]), ["attacks: ['apgd-ce', 'square'] there, ['apgd-ce'] here"], ["norm", "eps"]),
        (changed(network__not_original=False), ["network.not_original: True there, False here"], ["arch"]),
        (changed(data__order="new"), ["data.order: nothing there, new here"], ["data.n"]),
        (changed(data="none"), ["data.n: 20 there, nothing here", "data: nothing there, none here"], ["norm"]),
        ({k: v for k, v in IDENTITY.items() if k != "norm"}, ["norm: Linf there, nothing here"], ["eps", "arch"]),
    ],
)
def test_another_evaluation_is_refused(opened, tmp_path, other, differs, same):
    state = opened()
    state.write(record(0))
    state.close()
    with pytest.raises(UserError) as refusal:
        opened(other)
    message = str(refusal.value)
    assert message.startswith(f"eval.out: {tmp_path / 'state'} holds another evaluation")
    listed = message.partition("Differences: ")[2]
    assert listed
    for text in differs:
        assert text in listed
    for name in same:
        assert name not in listed
    # It is still the first one's.
    assert json.loads((tmp_path / "state/identity.json").read_text()) == IDENTITY


def test_the_evaluation_that_was_there_goes_on_after_a_refusal(opened):
    state = opened()
    state.write(record(1))
    state.close()
    refused = StateFolder(state.folder)
    with pytest.raises(UserError, match="holds another evaluation"):
        refused.open(changed(norm="L2"))
    refused.close()
    assert opened().read(CHUNKS) == {1: record(1)}


def test_many_differences_are_counted(opened):
    many = {f"setting{i}": i for i in range(SHOWN_DIFFERENCES + 3)}
    opened(many).close()
    with pytest.raises(UserError) as refusal:
        opened({name: value + 1 for name, value in many.items()})
    assert str(refusal.value).count(" there, ") == SHOWN_DIFFERENCES
    assert "; and 3 more. Give another eval.out." in str(refusal.value)


def test_values_that_json_writes_differently_are_the_same(opened):
    identity = {"attacks": ("apgd-ce", "square"), "counts": {0: 10, 1: 20}, "eps": 0.1 + 0.2}
    opened(identity).close()
    opened(identity)


@pytest.mark.parametrize("content", [b"", b'{"network": ', b"\xff\xfe"])
def test_a_damaged_identity_is_refused(opened, content):
    state = opened()
    state.close()
    (state.folder / "identity.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^eval\.out: .*identity\.json is damaged"):
        opened()


def test_two_runs_cannot_share_a_folder(opened):
    first = opened()
    with pytest.raises(UserError, match=r"^eval\.out: another run is working in .*/state; wait"):
        opened()
    first.write(record(0))  # it still can
    assert again(first, opened).read(CHUNKS) == {0: record(0)}


def test_runs_in_two_folders(opened, tmp_path):
    opened()
    opened(folder=tmp_path / "other")


HOLDER = """
import json, sys, time
from pathlib import Path
from evaluation.records import StateFolder

state = StateFolder(Path(sys.argv[1]))
state.open(json.loads(sys.argv[2]))
print("open", flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_no_lock(opened, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "state", json.dumps(IDENTITY)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="another run is working"):
            opened()
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
        assert opened().read(CHUNKS) == {}
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


WHOLE = json.dumps(record(2)).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-1],
        bytes(len(WHOLE)),  # what some file systems leave after a power failure
        b"\xff" + WHOLE,
        b"[]",
        b"null",
        json.dumps(record(3)).encode(),
        json.dumps({**record(2), "chunk": "2"}).encode(),
        json.dumps({**record(2), "chunk": [2]}).encode(),
        json.dumps({k: v for k, v in record(2).items() if k != "broken_by"}).encode(),
        json.dumps(record(2) | {"positions": None}).encode(),
        json.dumps(record(2) | {"broken_by": ["square"]}).encode(),
        json.dumps(record(2) | {"adv_pred": [3]}).encode(),
    ],
)
def test_a_damaged_record_is_open_again(opened, capsys, content):
    state = opened()
    for chunk in (1, 2):
        state.write(record(chunk))
    file = state.folder / "chunks/00002.json"
    file.write_bytes(content)
    state = again(state, opened)
    assert state.read(CHUNKS) == {1: record(1)}
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {file} is damaged (") and "renamed to 00002.json.1" in warning
    assert warning.count("\n") == 1
    assert file.with_name("00002.json.1").read_bytes() == content

    assert state.read(CHUNKS) == {1: record(1)}
    assert capsys.readouterr().err == ""  # said once
    state.write(record(2))
    assert again(state, opened).read(CHUNKS) == {1: record(1), 2: record(2)}


def test_a_record_damaged_twice(opened, capsys):
    state = opened()
    for _ in range(2):
        (state.folder / "chunks/00002.json").write_bytes(b"")
        assert state.read(CHUNKS) == {}
    assert "renamed to 00002.json.1" in (warnings := capsys.readouterr().err) and "renamed to 00002.json.2" in warnings


def test_a_record_that_the_disk_does_not_give(opened, capsys):
    state = opened()
    state.write(record(1))
    (state.folder / "chunks/00002.json").mkdir()  # reading a folder fails even for root
    (state.folder / "chunks/00002.json/file").touch()
    assert state.read(CHUNKS) == {1: record(1)}
    assert "renamed to 00002.json.1 and its chunk runs again" in capsys.readouterr().err


def test_half_written_files_are_removed(opened):
    state = opened()
    state.write(record(1))
    leftovers = ["chunks/.00002.json.x7.part", "chunks/.00001.npz.y8.part", ".identity.json.z9.part"]
    for name in leftovers:
        (state.folder / name).write_bytes(WHOLE)
    state = again(state, opened)
    assert not any((state.folder / name).exists() for name in leftovers)
    assert state.read(CHUNKS) == {1: record(1)}


def test_a_run_that_is_refused_removes_nothing(opened):
    """A partial file belongs to the other run, which is writing it."""
    state = opened()
    file = state.folder / "chunks/.00002.json.x7.part"
    file.write_bytes(b"{")
    with pytest.raises(UserError, match="another run"):
        opened()
    assert file.exists()


@pytest.mark.parametrize("below", ["", "eval", "deep/below"])
def test_a_folder_that_cannot_be_written(opened, tmp_path, below):
    """Below a file there are no folders, not even for root."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / below
    with pytest.raises(UserError, match=rf"^eval\.out: cannot write to {folder} \(.*\)\.$"):
        opened(folder=folder)


def test_a_folder_without_the_permission(opened, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"^eval\.out: cannot write to .*Permission denied"):
            opened()
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def small_files():
    """The system refuses files over 4 KiB, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_midway_leaves_nothing(opened, small_files):
    state = opened()
    state.write(record(0))
    big = {**record(1), "positions": list(range(5000))}
    with pytest.raises(OSError, match="File too large"):
        state.write(big)
    assert sorted(file.name for file in (state.folder / "chunks").iterdir()) == ["00000.json"]
    assert state.read(CHUNKS) == {0: record(0)}
    state.write(record(1))  # works again when there is space
    assert state.read(CHUNKS) == {0: record(0), 1: record(1)}
