"""Training on two nodes, one of which is lost and comes back.

A node is a Linux network namespace with its own address and host name; a pair of virtual interfaces joins the two.
Needs Linux, root, `ip` (iproute2) and `unshare` (util-linux); is skipped elsewhere. Half a minute for each loss.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training.helpers import Outcome, base_flags, largest_difference, read_outcome, write_images
from tests.training.test_resume import PROJECT, folder_of, start, timeless, two
from training.status import read_status

LINK = "cable"  # the interface of both nodes
PORT = 29400
PATIENCE = 150.0  # seconds on a busy machine
EPOCHS = 12
# What users who start the nodes by ssh run, with a shorter pause.
NODE = """
node=$1 address=$2 endpoint=$3 python=$4
shift 4
echo "node$node" >/proc/sys/kernel/hostname
folder=$(RANK=0 WORLD_SIZE=2 "$python" train.py --where "$@") || exit
is_host=0
if [ "$node" = 0 ]; then is_host=1; fi
for start in {1..10}; do
    echo "start $start"
    "$python" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=0 --rdzv_backend=c10d --rdzv_id=run1 \\
        --rdzv_endpoint="$endpoint" --local_addr="$address" --rdzv_conf="is_host=$is_host,join_timeout=900" train.py "$@" &&
        exit
    case $(cat "$folder/status.json") in
        *'"stopped"'* | *'"finished"'* | *'"failed"'* | *'"diverged"'*) exit 1 ;;
    esac
    sleep 1
done
exit 1
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Nodes:
    """Two nodes, at 10.77.0.1 and 10.77.0.2, each alone with the other; a context, which ends all that runs on them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = [f"{name}-{uuid.uuid4().hex[:8]}" for name in ("node0", "node1")]
        self._running: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> Nodes:
        try:
            for name in self._names:
                ip("netns", "add", name)
            first, second = self._names
            ip("link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second)
            for node, name in enumerate(self._names):
                ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", LINK)
                ip("-n", name, "link", "set", LINK, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._running:
            self.kill(node)
        for name in self._names:  # the pair of interfaces goes with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{node + 1}"

    def start(self, node: int, flags: dict[str, object]) -> None:
        """Run train.py on a node, again and again until its run has come to an end."""
        inside = ["ip", "netns", "exec", self._names[node], "unshare", "--uts", "bash", "-c", NODE, "bash"]
        arguments = [str(node), self.address(node), f"{self.address(0)}:{PORT}", sys.executable]
        environment = {"GLOO_SOCKET_IFNAME": LINK, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(self.output(node), "a") as file:
            self._running[node] = subprocess.Popen(
                [*inside, *arguments, *(f"--{name}={value}" for name, value in flags.items())],
                cwd=PROJECT,
                env=os.environ | environment,
                stdout=file,
                stderr=file,
            )

    def output(self, node: int) -> Path:
        """What a node has printed."""
        return self._folder / f"node{node}.out"

    def link(self, node: int, state: str) -> None:
        """Plug a node's cable in ("up") or out ("down")."""
        ip("-n", self._names[node], "link", "set", LINK, state)

    def kill(self, node: int) -> None:
        """Kill everything that runs on a node."""
        while pids := subprocess.run(
            ["ip", "netns", "pids", self._names[node]], capture_output=True, text=True
        ).stdout.split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)
        self._running[node].wait()

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses, when both nodes have come to an end."""
        end = time.monotonic() + seconds
        return [self._running[node].wait(end - time.monotonic()) for node in (0, 1)]


@pytest.fixture
def nodes(tmp_path) -> Iterator[Nodes]:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("two nodes on one machine need Linux and root")
    if missing := [name for name in ("ip", "unshare", "bash") if shutil.which(name) is None]:
        pytest.skip(f"two nodes on one machine need {' and '.join(missing)}")
    pair = Nodes(tmp_path)
    try:
        pair.__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        yield pair
    finally:
        pair.__exit__()


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of 10 steps of 16 images an epoch."""
    images = write_images(tmp_path_factory.mktemp("many"), train_images=40)
    return base_flags(images, images) | {
        "training.resume": "auto",
        "training.epochs": EPOCHS,
        "logging.ckpt_steps": 5,
        "logging.save_freq": EPOCHS,
        "validation.freq": EPOCHS,
    }


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Outcome:
    """Two processes on one machine."""
    flags = flags | {"logging.folder": tmp_path_factory.mktemp("undisturbed")}
    options = {"training.distributed": 1, "dist.world_size": 2}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = start(flags | options, env=environment, stdout=subprocess.DEVNULL)
    try:
        _, printed = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    return read_outcome(folder_of(two(flags)))


def wait_until(condition: Callable[[], bool], nodes: Nodes) -> float:
    """Seconds until it holds."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > PATIENCE:
            pytest.fail(f"not within {PATIENCE:g} s:\n" + "\n".join(nodes.output(node).read_text() for node in (0, 1)))
        time.sleep(0.05)
    return time.monotonic() - begin


def begin_on_both(nodes: Nodes, flags: dict[str, object]) -> Path:
    """Start a run on both nodes; returns its folder when it has trained for a while."""
    for node in (0, 1):
        nodes.start(node, flags)
    folder = folder_of(two(flags))
    wait_until(lambda: steps_saved(folder) >= 20, nodes)
    return folder


def steps_saved(folder: Path) -> int:
    status = read_status(folder)
    return 0 if status is None else status["step"]


def assert_undisturbed(nodes: Nodes, folder: Path, expected: Outcome) -> None:
    """The run comes to its end by itself, with the same weights bit for bit and each step once in the log."""
    assert nodes.wait(PATIENCE) == [0, 0], nodes.output(0).read_text()
    assert read_status(folder)["status"] == "finished"
    outcome = read_outcome(folder)
    assert largest_difference(outcome.weights, expected.weights) == 0
    assert [record["step"] for record in outcome.steps] == list(range(1, 10 * EPOCHS + 1))
    assert timeless(outcome) == timeless(expected)


@pytest.mark.slow
def test_node_is_cut_off_and_comes_back(nodes, flags, undisturbed, tmp_path):
    """Both nodes say what they miss and give up after dist.timeout_minutes; the next start trains on."""
    flags = flags | {"logging.folder": tmp_path / "runs", "dist.timeout_minutes": 0.2}
    folder = begin_on_both(nodes, flags)
    nodes.link(1, "down")
    seconds = wait_until(lambda: "error: " in nodes.output(0).read_text(), nodes)
    wait_until(lambda: "error: " in nodes.output(1).read_text(), nodes)
    wait_until(lambda: "start 2" in nodes.output(0).read_text(), nodes)
    nodes.link(1, "up")
    assert_undisturbed(nodes, folder, undisturbed)
    assert 10 < seconds < 40
    assert "error: process 1 of 2 does not answer" in nodes.output(0).read_text()
    assert "error: the first process, or its machine, cannot be reached" in nodes.output(1).read_text()
