"""What only a GPU can show about whole runs: exact resume, and two processes. `python -m benchmarks.gpu` runs them too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from attacks.registry import build_attack
from common.precision import deterministic
from common.processes import Processes, joined
from common.provenance import PROJECT
from tests.helpers.processes import free_port
from tests.training.test_step import batch, config_for
from training.build import build_state
from training.compiled import prepare_networks
from training.state import TrainState
from training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def trained(processes: Processes, saved: dict | None, *, steps: int, compile: str = "0") -> TrainState:
    """Build a state, load `saved`, and train up to step `steps`."""
    flags = {"model.arch": "convnext_tiny", "training.precision": "bf16", "training.deterministic": 1}
    config = config_for(**flags, **{"training.compile": compile, "model.model_ema": 1})
    state = build_state(config, processes)
    if saved is not None:
        state.load_state_dict(saved)
    prepare_networks(state, config, processes, size=32)
    while state.step < steps:
        images = batch(seed=2 * state.step + processes.rank)
        attack = build_attack(config.adv)
        train_step(
            state, [images], config=config, processes=processes, attack=attack, mixup=None, lr=1e-3, eps=config.adv.eps
        )
    return state


@pytest.mark.parametrize("compile", ["0", "1"])
def test_a_resumed_run_has_the_same_weights_bit_by_bit(compile, tmp_path):
    processes = Processes.alone()
    with deterministic(True):
        whole = trained(processes, None, steps=4, compile=compile)
        torch.save(trained(processes, None, steps=2, compile=compile).state_dict(), tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", map_location=processes.device, weights_only=True)
        resumed = trained(processes, saved, steps=4, compile=compile)
    for kind, network in whole.networks().items():
        for name, value in network.state_dict().items():
            assert torch.equal(value, resumed.networks()[kind].state_dict()[name]), (kind, name)


def one_of_two_ranks() -> None:
    """Take two steps as one of two processes, and fail if the other one has other weights."""
    with joined() as processes:
        state = trained(processes, None, steps=2)
        weights = torch.cat([p.detach().flatten() for p in state.model.parameters()])
        mean = processes.sum(weights.clone()) / 2
        assert torch.equal(mean, weights)


def test_two_ranks_on_one_gpu_have_the_same_weights():
    code = "from tests.training.test_gpu import one_of_two_ranks; one_of_two_ranks()"
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # NCCL refuses two ranks on one GPU of one host; as different hosts they talk through sockets.
    own = [{"RANK": str(rank), "NCCL_HOSTID": f"rank{rank}"} for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env=shared | o, **pipes) for o in own]
    outputs = [process.communicate()[0] for process in ranks]
    if any("Duplicate GPU" in text for text in outputs):
        pytest.skip("this NCCL takes no two ranks on one GPU")
    assert [process.returncode for process in ranks] == [0, 0], outputs
