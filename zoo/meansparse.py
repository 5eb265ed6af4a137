"""MeanSparse (Amini et al., "MeanSparse: Post-Training Robustness Enhancement Through Mean-Centered Feature Sparsification", 2024):
an operator next to layers of a trained network. The weights file contains its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.errors import UserError

_PARTS = ("running_mean", "running_var", "threshold")


class MeanSparse(nn.Module):
    """Sets values closer to their channel's mean than `threshold` standard deviations to the mean; threshold 0: identity.

    Channels are dimension 1 if its size fits the statistics, else the last dimension.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        """Create buffers with the names and shapes of `buffers`, the file's tensors of this operator; counters are not used."""
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
    """Return module name → tensors for each operator in a network's weights that is next to a layer in an `nn.Sequential`."""
    names = [name.removesuffix(".threshold") for name in state if name.endswith((".0.threshold", ".1.threshold"))]
    found = {at: {key.removeprefix(f"{at}."): state[key] for key in state if key.startswith(f"{at}.")} for at in names}
    return {at: tensors for at, tensors in found.items() if _is_operator(tensors)}


def _is_operator(tensors: Mapping[str, Tensor]) -> bool:
    if not all(part in tensors for part in _PARTS) or any("." in name for name in tensors):
        return False
    mean, variance, threshold = (tensors[part] for part in _PARTS)
    return mean.ndim == 1 and mean.shape == variance.shape and threshold.numel() == 1


def without_operators(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the network without the operators."""
    prefixes = tuple(f"{at}." for at in operators(state))
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def add_operators(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Insert the operators of `state` after (`….1`) or before (`….0`) their layers, in place.

    Raises:
        UserError: the layer does not exist.
    """
    layers = dict(network.named_modules())
    for at, buffers in operators(state).items():
        layer, _, place = at.rpartition(".")
        if not layer or layer not in layers:
            raise UserError(f"{at}: expected a MeanSparse operator next to a layer, but there is no layer {layer!r}.")
        pair = [network.get_submodule(layer), MeanSparse(buffers)]
        network.set_submodule(layer, nn.Sequential(*(pair if place == "1" else pair[::-1])))
