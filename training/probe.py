"""What a network computes, found by running a copy on the side: no list of layers would be complete.

The copy has weights of its own. A fresh head or layer scale would hide what lies before it, and a run that goes on from a state
has to find the same as the one before.
"""

from __future__ import annotations

import copy
import math
import random

import torch
from torch import Tensor, nn

# Share of what another image would change. On one device, rows of a batch of two differ by less, in half precision too.
SAME = 0.01


def probe_copy(module: nn.Module) -> nn.Module:
    """A copy with weights drawn anew, always the same ones for the same names and shapes, that let every part count."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                noise /= math.sqrt(math.prod(parameter.shape[1:]) or 1)
            elif name.endswith("bias"):  # large ones, the same for all images, would swamp them
                noise *= 0.1
            else:
                noise = 1 + 0.5 * noise
            parameter.copy_(noise)
    return module


def change_in_training(model: nn.Module, x: Tensor) -> str | None:
    """What the network does otherwise in training than in eval mode; None where it is the same function of each image.

    Args:
        model: maps images to logits; stays as it is.
        x: three different images (3, 3, H, W).
    """
    devices = [x.device] if x.device.type == "cuda" else []
    python_state = random.getstate()
    try:
        network = probe_copy(model)
        buffers = [buffer.clone() for buffer in network.buffers()]
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            expected, other = network.eval()(x[:2]).float()
            before = _random_states(devices)
            found = network.train()(x[[0, 2]])[0].float()  # beside another image
            drawn = before != _random_states(devices)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"could not be tried in training and eval mode ({type(error).__name__})"
    finally:
        random.setstate(python_state)
    if drawn:
        return "draws random numbers in training (dropout, drop path)"
    if not all(map(torch.equal, buffers, network.buffers())):
        return "changes its buffers in training (running statistics)"
    if not (found - expected).abs().max() <= SAME * (other - expected).abs().max():
        return "is another function in training, or mixes the images of a batch"
    return None


def _random_states(devices: list[torch.device]) -> list[bytes]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    return [repr(random.getstate()).encode(), *(state.numpy().tobytes() for state in states)]
