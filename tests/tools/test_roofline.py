"""Roofline: FLOPs and bytes of known operators, and kernels after fusion."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import main
from tools.roofline import Op, Trace, cpu_seconds, fused, parse, predict, prepared, recorded


@functools.cache
def step_of(batch: int, *, reuse: bool = False) -> list[Op]:
    return recorded("vit_micro", batch, size=32, precision="fp32", reuse=reuse, trim=False)


def traced(action) -> list[Op]:
    """Return the operators of `action`, as of a network."""
    with FakeTensorMode(), Trace() as trace:
        trace.inside = True
        action()
    return trace.ops


def moved(op: Op) -> tuple[int, int]:
    return sum(op.reads.values()), sum(op.writes.values())


def test_linear_layer() -> None:
    x, w, b = torch.ones(6, 4), torch.ones(5, 4), torch.ones(5)
    with Trace() as trace:
        F.linear(x, w, b)
    (op,) = trace.ops
    assert (op.kind, op.work, op.fusible) == ("matmul", 2 * 6 * 4 * 5, False)
    assert moved(op) == (4 * (6 * 4 + 5 * 4 + 5), 4 * 6 * 5)


@pytest.mark.parametrize("groups, kind", [(1, "matmul"), (4, "depthwise")])
def test_convolution_and_its_gradients(groups: int, kind: str) -> None:
    def action() -> None:
        x = torch.ones(2, 4, 8, 8, requires_grad=True)
        w = torch.ones(4, 4 // groups, 3, 3, requires_grad=True)
        F.conv2d(x, w, padding=1, groups=groups).sum().backward()

    flops = 2 * 2 * 8 * 8 * 9 * 4 * (4 // groups)
    assert [op.work for op in traced(action) if op.kind == kind] == [flops, 2 * flops]


def test_attention_and_its_gradient() -> None:
    def action() -> None:
        q, k, v = (torch.ones(2, 3, 5, 16, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    forward, backward = (op.work for op in traced(action) if op.kind == "attention")
    product = 2 * 2 * 3 * 5 * 5 * 16
    assert (forward, backward) == (2 * product, 5 * product)  # the gradient computes the first product again


def test_chain_of_pointwise_operators_is_one_kernel() -> None:
    kept = []

    def action() -> None:
        x, w = torch.ones(10, 10), torch.ones(10, 10)
        y = x.view(100).mul(2).add(1).view(10, 10)  # a view moves nothing
        kept.append(y @ w)
        kept.append(y.sigmoid() + kept[0])  # after the product, with one of the chain's results

    ops = [op for op in traced(action) if op.kind != "ones"]
    assert [moved(op) for op in ops] == [(400, 400), (400, 400), (800, 400), (400, 400), (800, 400)]
    kernels = fused(ops)
    # The chain reads x and writes y and its sigmoid. The sum reads the sigmoid and the product; nothing reads the sum.
    assert [(op.kind, *moved(op)) for op in kernels] == [("group", 400, 800), ("matmul", 800, 400), ("group", 800, 0)]


def test_operators_outside_the_network_are_not_fused() -> None:
    with FakeTensorMode(), Trace() as trace:
        torch.ones(8).mul(2).add(1)
    assert fused(trace.ops) == trace.ops and len(trace.ops) == 3


def test_expanded_tensor_has_the_bytes_of_its_storage() -> None:
    assert moved(traced(lambda: torch.ones(4).expand(100, 4).mul(2))[-1]) == (16, 1600)


def test_work_grows_linearly_with_the_batch() -> None:
    """Work is a + b·batch: fixed for the weights, and proportional for images."""
    totals = []
    for batch in (2, 4, 8):
        ops = step_of(batch)
        update = [op for op in ops if op.part == "update"]
        totals.append((len(ops), sum(op.work for op in ops if not op.fusible), sum(sum(moved(op)) for op in update)))
    (count, work_2, update), (_, work_4, _), (_, work_8, _) = totals
    assert work_8 == work_2 + 3 * (work_4 - work_2)
    assert {(n, u) for n, _, u in totals} == {(count, update)}


def test_parts_of_a_step() -> None:
    own, reused = ([op.part for op in step_of(2, reuse=reuse) if op.kind == "attention"] for reuse in (False, True))
    # Six blocks; the attack has three forward passes and two gradients, training one of each.
    assert (own.count("attack"), own.count("training"), own.count("update")) == (6 * 5, 6 * 2, 0)
    assert (reused.count("attack"), reused.count("training")) == (6 * 4, 6 * 2)


def test_step_without_data_has_the_operators_of_a_real_one() -> None:
    state, batch, step = prepared("vit_micro", 2, size=32, precision="fp32", reuse=False, trim=False)
    step(state, batch)
    with Trace() as trace:
        step(state, batch)
    assert [(op.kind, op.work) for op in trace.ops] == [(op.kind, op.work) for op in step_of(2)]


def test_operator_runs_alone() -> None:
    (op,) = (op for op in traced(lambda: torch.ones(8, 8) @ torch.ones(8, 8)) if op.kind == "matmul")
    assert cpu_seconds(op) >= 0


def test_quick_run(tmp_path) -> None:
    arguments = parse(["--quick", "--arch=vit_micro", "--copy-gbs=3000", f"--json={tmp_path / 'roofline.json'}"])
    assert main(predict, arguments) == 0
    rows = {row["name"]: row["figure"] for row in json.loads((tmp_path / "roofline.json").read_text())["rows"]}
    assert 0 < rows["images_per_second_vit_micro_custom_eager"] < rows["images_per_second_vit_micro_custom_compiled"]
    assert rows["reuse_ratio_vit_micro_custom_compiled"] < 1
