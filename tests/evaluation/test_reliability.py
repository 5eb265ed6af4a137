"""Signs that robustness is overestimated, as AutoAttack's authors' package warns of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evaluation.autoattack import ATTACKS, Among
from evaluation.reliability import examine, flags
from tests.evaluation.test_autoattack import Net, case

CPU = torch.device("cpu")


class Around(nn.Module):
    """Net with something done to its images, or to its logits."""

    def __init__(self, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.before, self.net, self.after = before or nn.Identity(), Net(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def softly(x: Tensor) -> Tensor:
    return x.softmax(1)


def rounded_where_bright(x: Tensor) -> Tensor:
    """Images whose first pixel is bright come through a rounding, whose gradient is 0."""
    return torch.where(x[:, :1, :1, :1] > 0.5, (255 * x).round() / 255, x)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Net(), {}),
        (Around(before=rounded_where_bright), {"zero_gradients": 7}),
        (Around(before=nn.Dropout(0.5)), {"random": True}),
        (Around(after=softly), {"probabilities": True}),
        (Among(Around(after=softly), [0, 2, *range(4, 10)]), {"probabilities": True}),
        (Around(after=torch.sigmoid), {}),  # in [0, 1], but their sum is not 1
    ],
)
def test_what_is_found_in_a_network(model: nn.Module, expected: dict[str, Any]) -> None:
    _, x, y = case()
    y = y % 8  # of the smaller head too
    x[:, 0, 0, 0] = torch.tensor([0.9] * 7 + [0.1] * 5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    nothing = {"zero_gradients": 0, "random": False, "probabilities": False}
    assert examine(model, x, y, device=CPU, gradients=True) == nothing | expected
    assert torch.equal(torch.get_rng_state(), before) and not x.requires_grad


def test_a_network_without_gradients_can_be_examined() -> None:
    model, x, y = case()
    model.forward = torch.no_grad()(model.forward)
    found = examine(model, x, y, device=CPU, gradients=False)
    assert found == {"zero_gradients": None, "random": False, "probabilities": False}


def record(broken_by: list[str], **found: Any) -> dict[str, Any]:
    reliability = {"zero_gradients": 0, "random": False, "probabilities": False} | found
    return {"broken_by": broken_by, "positions": list(range(len(broken_by))), "reliability": reliability}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([record(["", "clean", "apgd-ce", "fab-t"])], []),
        ([record(["square"] * 3 + [""] * 7)], ["broke 3 of 10 images that apgd-ce, apgd-t, fab-t did not break"]),
        ([record(["square"] + [""] * 499)], []),  # the package's own limit
        ([record(["square"] * 2 + [""] * 498)], ["broke 2 of 500 images"]),
        ([record([""] * 6, zero_gradients=2), record([""] * 2)], ["exactly 0 on 2 of 8 clean images (25.0%)"]),
        ([record([""], zero_gradients=None)], []),
        ([record([""]), record([""], random=True)], ["two forward passes of the same images differ"]),
        ([record([""], probabilities=True)] * 2, ["the attacks expect logits"]),
        ([record([""], probabilities=True), record([""])], []),
        ([{"broken_by": ["square"], "positions": [0]}], ["broke 1 of 1 images"]),  # of an earlier version
        ([{"broken_by": [], "positions": [], "reliability": None}], []),  # nothing could be decoded
    ],
)
def test_sentences(records: list[dict[str, Any]], said: list[str]) -> None:
    found = list(flags(records, ATTACKS))
    assert len(found) == len(said) and all(words in text for words, text in zip(said, found))


def test_square_alone_is_no_sign() -> None:
    assert list(flags([record(["square"] * 5)], ["square"])) == []
