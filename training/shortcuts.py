"""Two shortcuts that compute the same with less work, equal up to rounding. `auto` uses them on a CPU; untested on GPUs.

`training.trim_last_block`: the head of a vision transformer reads only the class token. So the last block needs keys and values
of all tokens, but query, projection and MLP of the class token only. The head of a ConvNeXt reads the mean over positions, and
the mean commutes with linear layers. So the second linear layer of the last MLP runs once per image, not once per position.

`training.reuse_forward`: the attack's evaluation of its last iterate is also the forward pass of training, if the network is the
same function of each image in train and eval mode.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.profiler import record_function

from attacks.losses import cross_entropy
from attacks.registry import Attack
from training.state import TrainState
from utils_architecture import IsotropicBlock, IsotropicConvNeXt

# Largest share of a micro-batch that runs through the network again. With APGD-2, 0 to 2 % of CIFAR-10's images have their highest
# loss before the last iterate.
AGAIN = 1 / 16
# Tolerance, relative to the change between two images. Rows of a batch of two differ by less on one device, also in half precision.
SAME = 0.01


def asked_for(value: str, device: torch.device) -> bool:
    """Return whether a flag's `value` (auto, 0, 1) asks for its shortcut on this device."""
    return value == "1" or (value == "auto" and device.type == "cpu")


# --- the last block -------------------------------------------------------------------------------------------------------


class ClassTokenBlock(Block):
    """timm's `Block` that maps tokens (B, N, C) to the class token only: (B, 1, C)."""

    def forward(self, x: Tensor) -> Tensor:
        attention, (batch, tokens, dim) = self.attn, x.shape
        y = self.norm1(x)
        heads = (attention.num_heads, dim // attention.num_heads)
        weights = attention.qkv.weight.split([dim, 2 * dim])
        biases = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split([dim, 2 * dim])
        q = F.linear(y[:, :1], weights[0], biases[0]).view(batch, 1, *heads).transpose(1, 2)
        k, v = F.linear(y, weights[1], biases[1]).view(batch, tokens, 2, *heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v)
        y = attention.proj(y.transpose(1, 2).reshape(batch, 1, dim))
        x = x[:, :1] + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PooledConvNeXtBlock(ConvNeXtBlock):
    """timm's `ConvNeXtBlock` that maps positions (B, C, H, W) to their mean only: (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp.fc2(self.mlp.norm(self.mlp.act(self.mlp.fc1(y))).mean(dim=(1, 2)))
        if self.gamma is not None:
            y = y * self.gamma
        return self.drop_path(y[:, :, None, None]) + self.shortcut(x).mean(dim=(2, 3), keepdim=True)


class PooledIsotropicBlock(IsotropicBlock):
    """`IsotropicBlock` that maps positions (B, C, H, W) to their mean only: (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)).mean(dim=(1, 2)))
        return x.mean(dim=(2, 3), keepdim=True) + self.drop_path(y[:, :, None, None])


def trim_last_block(model: nn.Module) -> bool:
    """Change the last block in place so that it computes only what the head reads; return whether it was changed.

    Names in the state dict stay. A network with another head or block, or with dropout in the block, is not changed. Nor is one
    whose block computes something else, which is possible with another version of timm.
    """
    for network in model.modules():
        block, trimmed = _last_block(network)
        if trimmed is None or any(isinstance(module, nn.Dropout) and module.p for module in block.modules()):
            continue
        if _agrees(block, trimmed):
            block.__class__ = trimmed
            return True
    return False


def _last_block(network: nn.Module) -> tuple[nn.Module, type[nn.Module] | None]:
    """Return the last block and its replacement; the latter is None if head or block are of another kind."""
    kind = type(network)
    if (
        kind is VisionTransformer
        and network.global_pool == "token"
        and network.attn_pool is None
        and len(network.blocks)
    ):
        block = network.blocks[-1]
        if type(block) is Block and type(block.attn) is Attention:
            return block, ClassTokenBlock
    elif kind is ConvNeXt and network.head.global_pool.pool_type == "avg" and isinstance(network.norm_pre, nn.Identity):
        block = network.stages[-1].blocks[-1]
        if type(block) is ConvNeXtBlock and not block.use_conv_mlp and type(block.mlp) is Mlp:
            return block, PooledConvNeXtBlock
    elif kind is IsotropicConvNeXt:
        return network.blocks[-1], PooledIsotropicBlock
    return network, None


@torch.no_grad()
def _agrees(block: nn.Module, trimmed: type[nn.Module]) -> bool:
    """Return whether both give the same output for random input."""
    generator = torch.Generator().manual_seed(0)
    try:
        block = _probe_copy(block).to("cpu", torch.float32).eval()
        if trimmed is ClassTokenBlock:
            x = torch.randn(2, 5, block.attn.qkv.in_features, generator=generator)
            expected = block(x)[:, :1]
        else:
            convolution = block.dwconv if trimmed is PooledIsotropicBlock else block.conv_dw
            x = torch.randn(2, convolution.in_channels, 3, 3, generator=generator)
            expected = block(x).mean(dim=(2, 3), keepdim=True)
        block.__class__ = trimmed
        return bool((block(x) - expected).abs().max() <= 1e-4 * expected.abs().max())
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


# --- the attack's last forward pass ---------------------------------------------------------------------------------------


def places_again(batch_size: int) -> int:
    """Return how many images of a micro-batch can run through the network again; the fixed shape is compiled only once."""
    return math.ceil(AGAIN * batch_size)


def loss_reusing_forward(
    state: TrainState, x: Tensor, y: Tensor, *, attack: Attack, eps: float, on_attack_step: Callable | None
) -> Tensor:
    """Return the loss of `training.step.training_loss`, with the attack's last evaluation as the forward pass of training.

    The few images whose best iterate is an earlier one run through the network again. All images run again, and the first pass
    is discarded, if these are more than `places_again`, or if a loss is not finite (its gradient times zero is not finite either).
    """
    kept = {}

    def evaluate_last(x_last: Tensor) -> Tensor:
        with record_function("forward"):
            kept["x"], kept["logits"] = x_last, state.parallel(x_last)
        return kept["logits"]

    with record_function("attack"):
        x_best = attack(state.attacked, x, y, eps=eps, on_step=on_attack_step, evaluate_last=evaluate_last)
    losses = cross_entropy(kept.pop("logits"), y)
    others = (x_best != kept.pop("x")).flatten(1).any(dim=1)
    count = int(torch.where(losses.isfinite().all(), others.sum(), len(y)))
    if count == 0:
        return losses.mean()
    places = places_again(len(y))
    if count > places:
        del losses
        return cross_entropy(state.parallel(x_best), y).mean()
    index = others.int().topk(places).indices
    again = cross_entropy(state.parallel(x_best[index]), y[index])
    return ((losses * ~others).sum() + (again * others[index]).sum()) / len(y)


def change_in_training(model: nn.Module, x: Tensor) -> str | None:
    """Return what the network does differently in train and eval mode; None if it is the same function of each image in both.

    A copy runs in both modes, because no list of layers would be complete.

    Args:
        model: maps images to logits; is not changed.
        x: three different images (3, 3, H, W).
    """
    devices = [x.device] if x.device.type != "cpu" else []
    python_state = random.getstate()
    try:
        network = _probe_copy(model)
        buffers = [buffer.clone() for buffer in network.buffers()]
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=x.device.type):
            expected, other = network.eval()(x[:2]).float()
            before = _random_states(devices)
            found = network.train()(x[[0, 2]])[0].float()  # with another image in the batch
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
        return "computes another function in training, or mixes the images of a batch"
    return None


def _random_states(devices: list[torch.device]) -> list[bytes]:
    states = [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in devices)]
    return [repr(random.getstate()).encode(), *(state.numpy().tobytes() for state in states)]


def _probe_copy(module: nn.Module) -> nn.Module:
    """Return a copy with random weights, equal for equal names and shapes, in which every layer affects the output.

    A freshly initialised head or layer scale would hide the layers before it. A resumed run must get the same result as before.
    """
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                noise /= math.sqrt(math.prod(parameter.shape[1:]) or 1)
            elif name.endswith("bias"):  # large biases, equal for all images, would hide the differences between images
                noise *= 0.1
            else:
                noise = 1 + 0.5 * noise
            parameter.copy_(noise)
    return module
