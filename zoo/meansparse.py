"""MeanSparse (Amini et al., "MeanSparse: Post-Training Robustness Enhancement Through Mean-Centered Feature Sparsification", 2024):
an operator behind layers of a trained network, of which its files hold the statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.errors import UserError

_PARTS = ("running_mean", "running_var", "threshold")


class MeanSparse(nn.Module):
    """Values closer to their channel's mean than `threshold` standard deviations become the mean; threshold 0 changes nothing.

    Channels are dimension 1 where that has as many, else the last one.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        """`buffers`: all that the file holds for this operator; the counters among them are not used."""
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, torch.zeros_like(value))

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold == 0:
            return x
        shape = [1] * x.ndim
        shape[1 if x.shape[1] == len(self.running_mean) else -1] = -1
        mean, crop = self.running_mean.view(shape), (self.threshold * self.running_var.sqrt()).view(shape)
        return torch.where((x - mean).abs() < crop, mean.to(x.dtype), x)


def operators(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name → tensors of each operator in a network's weights, where it stands beside a layer in an `nn.Sequential`."""
    names = [name.removesuffix(".threshold") for name in state if name.endswith((".0.threshold", ".1.threshold"))]
    found = {at: {key.removeprefix(f"{at}."): state[key] for key in state if key.startswith(f"{at}.")} for at in names}
    return {at: tensors for at, tensors in found.items() if _is_operator(tensors)}


def _is_operator(tensors: Mapping[str, Tensor]) -> bool:
    if not all(part in tensors for part in _PARTS) or any("." in name for name in tensors):
        return False
    mean, variance, threshold = (tensors[part] for part in _PARTS)
    return mean.ndim == 1 and mean.shape == variance.shape and threshold.numel() == 1


def without_operators(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the network that they were added to."""
    prefixes = tuple(f"{at}." for at in operators(state))
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def add_operators(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the operators that `state` has behind (`….1`) or before (`….0`) their layers, in place.

    Raises:
        UserError: there is no such layer.
    """
    layers = dict(network.named_modules())
    for at, buffers in operators(state).items():
        layer, _, place = at.rpartition(".")
        if not layer or layer not in layers:
            raise UserError(f"expected {at} to be an operator of MeanSparse beside a layer, but there is no {layer!r}.")
        pair = [network.get_submodule(layer), MeanSparse(buffers)]
        network.set_submodule(layer, nn.Sequential(*(pair if place == "1" else pair[::-1])))
