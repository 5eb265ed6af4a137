import dataclasses
import errno
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig

from common.errors import UserError
from tests.helpers.processes import wait_until
from training import checkpoint
from training.checkpoint import LAST, PREVIOUS, DamagedState, StateFiles, newest_state, read_state
from training.stop import PATIENCE_VARIABLE


def write(folder, *states):
    """Save states one after the other, and return what became of them."""
    files = StateFiles(folder)
    for state in states:
        files.save(state)
    files.wait()
    return files.outcomes()


def small(step, value=None):
    return {"step": step, "model": {"weight": torch.full((4, 3), float(step if value is None else value))}}


def same(a, b):
    """Equal in types, values (NaN never), dtypes and the order in memory."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


# ------------------------------------------------------------------------------------------------ round trip
def test_tensors_of_every_kind_come_back(tmp_path):
    base = torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "bfloat16": base.bfloat16(),
        "float16": base.half(),
        "float64": base.double() * 1e200,
        "complex": torch.tensor([1 + 2j, -3j]),
        "int": torch.tensor([2**62, -1]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "0-dim": torch.tensor(3.5),
        "0-dim float64": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "slice": base[:, ::2, 1:3],
        "transposed": base[0, 0].t(),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "parameter": nn.Parameter(base[0].clone()),
        "int extremes": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    }
    state = {"step": 3, "tensors": tensors}
    assert [(o.step, o.error) for o in write(tmp_path, state)] == [(3, None)]
    loaded = read_state(tmp_path / LAST)
    assert same(state, loaded)
    assert loaded["tensors"]["channels_last"].stride() == tensors["channels_last"].stride()
    assert loaded["tensors"]["transposed"].stride() == tensors["transposed"].stride()
    assert not any(tensor.requires_grad for tensor in loaded["tensors"].values())


def test_plain_values_come_back_with_their_types(tmp_path):
    values = {
        "a": None,
        "b": [1, True, -(2**70), 0.1, 1e-300, float("inf"), "ä\n", ""],
        3: (),
        -1: ((1,), [], {}),
        0.5: {"": (1, 2, 3, 4)},
    }
    state = {"step": 0, "values": values}
    write(tmp_path, state)
    assert same(state, read_state(tmp_path / LAST))


def test_an_optimiser_resumes_as_if_nothing_had_happened(tmp_path):
    def network():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()

    model, optimizer = network()
    train(model, optimizer, range(3))
    write(tmp_path, {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = network()
    state = read_state(tmp_path / LAST)
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    train(resumed, resumed_optimizer, range(3, 6))
    assert same(dict(model.state_dict()), dict(resumed.state_dict()))


def test_a_state_is_as_it_was_when_save_was_called(tmp_path, monkeypatch):
    """The write is delayed until the caller has changed everything."""
    changed, really = multiprocessing.get_context().Event(), checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", lambda *args: (changed.wait(10), really(*args)))
    weight, values = torch.zeros(5), [1, 2]
    state = {"step": 1, "weight": weight, "view": weight[1:3], "values": values, "nested": {"weight": weight}}
    files = StateFiles(tmp_path)
    files.save(state)
    weight.fill_(7)
    values.append(3)
    state["nested"]["new"] = 1
    state["step"] = 2
    assert files.outcomes() == []  # still being written
    changed.set()
    files.wait()
    zeros = torch.zeros(5)
    assert same(
        read_state(tmp_path / LAST),
        {"step": 1, "weight": zeros, "view": zeros[1:3], "values": [1, 2], "nested": {"weight": zeros}},
    )
    assert [o.step for o in files.outcomes()] == [1]
    assert files.outcomes() == []


def test_a_view_takes_no_more_space_than_it_has_values(tmp_path):
    write(tmp_path, {"step": 1, "view": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / LAST).stat().st_size < 10_000


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": 1, "best": np.float64(0.5)}, "state['best']: expected a tensor or a plain value, got numpy.float64"),
        (
            {"step": 1, "x": [{"y": object()}]},
            "state['x'][0]['y']: expected a tensor or a plain value, got builtins.object",
        ),
        ({"step": 1, "x": {(1, 2): 3}}, "a key of state['x']: expected"),
        ({"step": 1, "x": torch.Size([1])}, "state['x']: expected"),
        ({"step": 1.0}, 'state["step"]: expected an int, got 1.0'),
        ({"step": True}, 'state["step"]: expected an int, got True'),
        ({}, 'state["step"]: expected an int, got None'),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, state, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        StateFiles(tmp_path).save(state)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ two files
def test_the_state_before_is_kept(tmp_path):
    outcomes = write(tmp_path, small(1), small(2), small(3))
    assert [(o.step, o.error) for o in outcomes] == [(1, None), (2, None), (3, None)]
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}
    assert same(read_state(tmp_path / LAST), small(3))
    assert same(read_state(tmp_path / PREVIOUS), small(2))
    state, path, warnings = newest_state(tmp_path)
    assert (state["step"], path, warnings) == (3, tmp_path / LAST, [])


def test_states_of_another_process_are_rotated_too(tmp_path):
    write(tmp_path, small(1))
    write(tmp_path, small(2))
    assert same(read_state(tmp_path / PREVIOUS), small(1))


def test_a_removed_last_state_leaves_the_one_before(tmp_path):
    """The same as a crash between the two renames."""
    write(tmp_path, small(1), small(2))
    (tmp_path / LAST).unlink()
    state, path, warnings = newest_state(tmp_path)
    assert (state["step"], path, warnings) == (1, tmp_path / PREVIOUS, [])
    write(tmp_path, small(3))
    assert same(read_state(tmp_path / LAST), small(3))
    assert same(read_state(tmp_path / PREVIOUS), small(1))


def test_a_damaged_last_state_does_not_displace_the_good_one(tmp_path):
    write(tmp_path, small(1), small(2))
    cut(tmp_path / LAST)
    assert [o.error for o in write(tmp_path, small(3))] == [None]
    assert same(read_state(tmp_path / LAST), small(3))
    assert same(read_state(tmp_path / PREVIOUS), small(1))


def test_leftovers_of_a_killed_process_are_deleted(tmp_path):
    write(tmp_path, small(1))
    for name in ("last.next.pt", ".last.next.pt.ab12.part", ".params.json.x.part", "weights_1.pt"):
        (tmp_path / name).write_bytes(b"x")
    StateFiles(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LAST, ".params.json.x.part", "weights_1.pt"}


def test_nothing_where_nothing_was_saved(tmp_path):
    assert newest_state(tmp_path) is None
    assert newest_state(tmp_path / "absent") is None


# ------------------------------------------------------------------------------------------------ failing writes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_a_state_with_a_non_finite_tensor_is_not_written(tmp_path, value, dtype):
    """Wherever the value is in memory: the search goes by vectors and blocks."""
    write(tmp_path, small(1))
    for place in (0, 17, 40_002):
        weight = torch.zeros(3, 1, 13_335, dtype=dtype)
        weight.view(-1)[place] = value
        (outcome,) = write(tmp_path, {"step": 2, "model": {"weight": weight}})
        assert (
            outcome.error
            == "state['model']['weight'] contains NaN or infinity, so training cannot resume from this state"
        )
    assert {path.name for path in tmp_path.iterdir()} == {LAST}
    assert same(read_state(tmp_path / LAST), small(1))


def test_large_finite_values_are_written(tmp_path):
    """Their sum would overflow."""
    weight = torch.full((100,), torch.finfo(torch.float32).max)
    assert [o.error for o in write(tmp_path, {"step": 1, "weight": weight})] == [None]


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        return refuse() if self.room < 0 else self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def unchanged(folder):
    """Both states are as they were, there is nothing else, and the next one is written."""
    assert {path.name for path in folder.iterdir()} == {LAST, PREVIOUS}
    assert same(read_state(folder / LAST), small(2))
    assert same(read_state(folder / PREVIOUS), small(1))


@pytest.mark.parametrize("room", [*range(0, 400, 40), 900, 1200, 1500])
def test_a_full_disk_leaves_the_earlier_states(tmp_path, monkeypatch, room):
    write(tmp_path, small(1), small(2))
    files = StateFiles(tmp_path)
    with monkeypatch.context() as patch:
        save = torch.save
        patch.setattr(torch, "save", lambda state, file: save(state, FullDisk(file, room)))
        files.save(small(3))
        files.wait()
    assert [(o.step, o.error) for o in files.outcomes()] == [(3, "No space left on device")]
    unchanged(tmp_path)
    files.save(small(4))
    files.wait()
    assert [(o.step, o.error) for o in files.outcomes()] == [(4, None)]
    assert newest_state(tmp_path)[0]["step"] == 4


def test_a_disk_that_fails_to_sync_leaves_the_earlier_states(tmp_path, monkeypatch):
    write(tmp_path, small(1), small(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        (outcome,) = write(tmp_path, small(3))
    assert outcome.error == "No space left on device"
    unchanged(tmp_path)


def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    """A file system that loses the end without saying so."""
    write(tmp_path, small(1), small(2))
    really = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, fill: (really(path, fill), cut(path)))
    (outcome,) = write(tmp_path, small(3))
    assert "last.next.pt is damaged" in outcome.error
    unchanged(tmp_path)


def test_a_state_is_synced_before_it_takes_a_name_and_the_folder_after(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def kind(handle):
        return "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"

    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(kind(handle)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(os.path.basename(b)), replace(a, b)))
    write(tmp_path, small(1), small(2))
    assert events == ["file", "last.next.pt", LAST, "folder", "file", "last.next.pt", PREVIOUS, LAST, "folder"]


def test_a_vanished_folder_is_an_outcome(tmp_path):
    (outcome,) = write(tmp_path / "absent", small(1))
    assert outcome.error == "No such file or directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_outcome(tmp_path):
    tmp_path.chmod(0o555)
    (outcome,) = write(tmp_path, small(1))
    tmp_path.chmod(0o755)
    assert outcome.error == "Permission denied"


# ------------------------------------------------------------------------------------------------ damaged files
def cut(path, keep=None):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if keep is None else keep])


def flip(path, place, bits=0xFF):
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


@pytest.fixture
def state_file(tmp_path):
    """A file with a state, what it holds, and its bytes."""
    state = small(5) | {"optimizer": {"state": {0: {"step": torch.tensor(2.0)}}}, "values": [1, 0.5, "x"]}
    write(tmp_path, state)
    path = tmp_path / LAST
    return path, state, path.read_bytes()


def test_a_cut_file_is_damaged_wherever_it_was_cut(state_file):
    path, _, data = state_file
    for length in [*range(0, len(data), 7), *range(len(data) - 40, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(DamagedState, match="it is empty" if length == 0 else "its end is missing"):
            read_state(path)


def test_a_changed_byte_is_found_or_does_no_harm(state_file):
    """Every byte of the records' list, where no checksum is, and every third of the rest."""
    path, state, data = state_file
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    found = harmless = 0
    for place in [*range(0, directory, 3), *range(directory, len(data))]:
        changed = bytearray(data)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        try:
            loaded = read_state(path)
        except DamagedState:
            found += 1
        else:
            harmless += 1
            assert same(state, loaded), f"byte {place}"
    assert found > 600 and harmless > 100  # harmless: padding, dates


def test_a_changed_value_is_found(state_file):
    path, _, data = state_file
    values = torch.full((4, 3), 5.0).numpy().tobytes()
    assert data.count(values) == 1
    for place in range(len(values)):
        path.write_bytes(data)
        flip(path, data.index(values) + place, bits=1 << place % 8)
        with pytest.raises(DamagedState, match="the checksum or header of archive/data/0 is wrong"):
            read_state(path)


def test_a_tensor_marked_as_a_folder_is_found(state_file):
    """torch.load would leave such a tensor as the memory happens to be."""
    path, _, data = state_file
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
        for record in archive.infolist():
            if record.filename.endswith("data/0"):
                break
            place += 46 + len(record.filename) + len(record.extra)
    flip(path, place + 38, bits=0x10)
    with pytest.raises(DamagedState, match="the checksum or header of archive/data/0 is wrong"):
        read_state(path)


def test_a_lost_block_is_found(state_file):
    path, state, data = state_file
    for place in range(0, len(data), 64):
        path.write_bytes(data[:place] + bytes(512) + data[place + 512 :])
        with pytest.raises(DamagedState):
            read_state(path)


def test_a_file_without_checksums_is_not_trusted(tmp_path, monkeypatch):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this PyTorch always writes them")
    write(tmp_path, small(1), small(2))
    save = torch.save

    def save_without(state, file):
        torch.serialization.set_crc32_options(False)  # holds for one thread only
        try:
            save(state, file)
        finally:
            torch.serialization.set_crc32_options(True)

    monkeypatch.setattr(torch, "save", save_without)
    (outcome,) = write(tmp_path, small(3))
    assert "last.next.pt is damaged (the checksum or header of" in outcome.error
    unchanged(tmp_path)


def test_other_kinds_of_files_are_reported(tmp_path):
    path = tmp_path / LAST
    path.write_text("step: 5\n")
    with pytest.raises(DamagedState, match="its end is missing, or it is another kind of file"):
        read_state(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedState, match="Is a directory"):
        read_state(path)
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "absent.pt")
    for content in ({"weight": torch.zeros(2)}, [1, 2], {"step": torch.tensor(1)}):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(UserError, match="is not a training state: expected a dict with the int .step.") as error:
            read_state(tmp_path / "weights.pt")
        assert not isinstance(error.value, DamagedState)


def test_a_damaged_state_is_passed_over_with_a_warning(tmp_path):
    write(tmp_path, small(1), small(2))
    cut(tmp_path / LAST)
    state, path, warnings = newest_state(tmp_path)
    assert same(state, small(1)) and path == tmp_path / PREVIOUS
    assert warnings == [
        f"{tmp_path / LAST} is damaged (its end is missing, or it is another kind of file); the previous state, "
        "last.previous.pt of step 1, is used."
    ]


def test_a_damaged_previous_state_does_not_matter(tmp_path):
    write(tmp_path, small(1), small(2))
    cut(tmp_path / PREVIOUS)
    state, path, warnings = newest_state(tmp_path)
    assert same(state, small(2)) and path == tmp_path / LAST and warnings == []


@pytest.mark.parametrize("names", [(LAST, PREVIOUS), (LAST,), (PREVIOUS,)])
def test_only_damaged_states_are_an_error(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        newest_state(tmp_path)
    assert all(f"{name} is damaged (it is empty)" in str(error.value) for name in names)
    assert str(error.value).count("is damaged") == len(names)
    assert "--training.resume=none" in str(error.value) and "--model.ckpt_path=" in str(error.value)


# ------------------------------------------------------------------------------------------------ hostile files
class Crafted:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_crafted_file_executes_nothing(tmp_path):
    mark = tmp_path / "executed"
    content = {"step": 1, "model": Crafted(f"touch {mark}")}
    pickle.loads(pickle.dumps(content))
    assert mark.exists()  # it would work
    mark.unlink()

    in_zip, legacy, bare = tmp_path / "zip.pt", tmp_path / "legacy.pt", tmp_path / "bare.pt"
    torch.save(content, in_zip)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    bare.write_bytes(pickle.dumps(content))
    with pytest.raises(
        UserError, match=r"is rejected: it contains Python objects or code \((posix|os)\.system\)"
    ) as error:
        read_state(in_zip)
    assert not isinstance(error.value, DamagedState)
    for path in (legacy, bare):
        with pytest.raises(UserError):
            read_state(path)
    in_zip.rename(tmp_path / LAST)
    with pytest.raises(UserError, match="is rejected"):
        newest_state(tmp_path)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------ killed processes
def save_until_killed(folder, announce):
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    found = newest_state(folder)
    step, files = found[0]["step"] if found else 0, StateFiles(folder)
    while True:
        step += 1
        files.save({"step": step, "model": [torch.full((30_000,), float(step)) for _ in range(40)]})
        files.wait()
        assert [o.error for o in files.outcomes()] == [None]
        announce.value = step


def test_a_killed_process_leaves_a_whole_state(tmp_path):
    """Twelve processes resume from each other's states; each is killed at a random moment."""
    forking, rng = multiprocessing.get_context("fork"), random.Random(0)
    announced = forking.Value("q", 0, lock=False)
    for _ in range(12):
        process = forking.Process(target=save_until_killed, args=(tmp_path, announced))
        before = announced.value
        process.start()
        while announced.value == before and process.is_alive():  # it has begun
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        state, _, warnings = newest_state(tmp_path)
        assert warnings == []
        assert state["step"] in (announced.value - 1, announced.value, announced.value + 1)
        assert all((tensor == state["step"]).all() for tensor in state["model"])


def test_a_write_is_finished_while_the_process_ends(tmp_path):
    """Without wait(), as after an exception in the caller."""
    process = multiprocessing.get_context("fork").Process(target=StateFiles(tmp_path).save, args=(small(4),))
    process.start()
    process.join()
    assert newest_state(tmp_path)[0]["step"] == 4


# --- a launcher that does not wait for ever -----------------------------------------------------------------------------


@pytest.mark.parametrize(("patience", "warned"), [(0.5, True), (30.0, False), (None, False)])
def test_a_save_for_which_torchrun_would_not_wait_is_reported_once(tmp_path, monkeypatch, capsys, patience, warned):
    original = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", lambda *args: (time.sleep(0.3), original(*args)))
    writer = checkpoint.Checkpointer(StateFiles(tmp_path), minutes=0, steps=0, step=0, stored=0, patience=patience)
    for step in (1, 2):
        writer.save(step, lambda step=step: {"step": step})
        assert writer.has_stored(wait=True) and writer.stored_step == step
    assert capsys.readouterr().err.count("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=2 (needs") == warned


@pytest.mark.slow
def test_torchrun_waits_as_long_as_configured(tmp_path):
    """What its variable is called, and that it rules; see `training.stop.PATIENCE_VARIABLE`."""
    if "shutdown_timeout" not in {field.name for field in dataclasses.fields(LaunchConfig)}:
        pytest.skip("this PyTorch waits 30 s")
    script = tmp_path / "save.py"
    script.write_text(
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(4)\n    open(sys.argv[1] + '.saved', 'w')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nopen(sys.argv[1], 'w')\ntime.sleep(60)\n"
    )
    for seconds, saved in (("1", False), ("20", True)):
        ready = tmp_path / seconds
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script), str(ready)]
        launcher = subprocess.Popen(command, env=os.environ | {PATIENCE_VARIABLE: seconds}, stderr=subprocess.DEVNULL)
        wait_until(ready.exists)
        launcher.terminate()
        launcher.wait(timeout=60)
        assert ready.with_suffix(".saved").exists() == saved
