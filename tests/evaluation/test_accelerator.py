"""A chunk of an evaluation on the fake accelerator: the CPU's verdicts."""

from __future__ import annotations

import copy

import pytest
import torch

import evaluation.autoattack
from evaluation.autoattack import ATTACKS, Among, attack_chunk, check_adversarial
from evaluation.reliability import examine
from tests.evaluation.helpers import short_autoattack
from tests.evaluation.test_autoattack import EPS, case
from tests.helpers.accelerator import MARKS, Accelerator

pytestmark = MARKS

# AutoAttack selects images by masks, moves numbers to the device while it attacks, and asks for sums.
AUTOATTACK = ("_local_scalar_dense", "nonzero", "index", "index_put_", "index_put", "_to_copy", "copy_", "equal")


def shortest(*args, **kwargs):
    engine = short_autoattack(*args, **kwargs)
    for attack in (engine.apgd, engine.apgd_targeted, engine.fab):
        attack.n_iter, attack.n_restarts = 4, 1
    engine.square.n_queries = 20
    return engine


@pytest.mark.parametrize("norm, attacks", [("Linf", ATTACKS), ("L2", ATTACKS[2:]), ("L1", ATTACKS[:1])])
def test_a_chunk_equals_the_cpus(norm, attacks):
    found = []
    with pytest.MonkeyPatch.context() as patch, Accelerator() as mode, mode.allowed(*AUTOATTACK):
        patch.setattr(evaluation.autoattack, "standard_autoattack", shortest)
        for name in ("cpu", "fake"):
            model, x, y = case(n=8)
            model, device = Among(model, list(range(9))).to(name), torch.device(name)
            y = y.clamp(max=8)
            threat = {"norm": norm, "eps": EPS[norm], "device": device}
            verdicts = attack_chunk(model, x, y, seed=3, attacks=attacks, fast=copy.deepcopy(model), **threat)
            check = check_adversarial(model, x, verdicts, y, **threat)
            signs = examine(model, x, y, device=device, gradients=True)
            assert verdicts.attack_seconds.keys() == set(attacks) and all(verdicts.attack_seconds.values())
            found.append([verdicts.clean_pred, verdicts.broken_by, verdicts.adv_pred, verdicts.x_adv, check, signs])
    torch.testing.assert_close(found[1][3], found[0][3], rtol=0, atol=0)
    assert str(found[1]) == str(found[0])
