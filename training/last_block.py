"""The last block of a network, computing only what the head reads of it: the same function, from the same weights.

A vision transformer's head reads the class token alone, so the last block needs keys and values of all tokens but query,
projection and MLP of that one, which saves nearly ten of the block's twelve products with weights. A ConvNeXt's head reads the
mean over positions, and the mean passes through what is linear: the second of the MLP's two products is needed once an image
instead of once a position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from training.probe import probe_copy
from utils_architecture import IsotropicBlock, IsotropicConvNeXt


class ClassTokenBlock(Block):
    """timm's `Block`, of whose tokens (B, N, C) only the class token is computed: (B, 1, C)."""

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
    """timm's `ConvNeXtBlock`, of whose positions (B, C, H, W) only the mean is computed: (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp.fc2(self.mlp.norm(self.mlp.act(self.mlp.fc1(y))).mean(dim=(1, 2)))
        if self.gamma is not None:
            y = y * self.gamma
        return self.drop_path(y[:, :, None, None]) + self.shortcut(x).mean(dim=(2, 3), keepdim=True)


class PooledIsotropicBlock(IsotropicBlock):
    """`IsotropicBlock`, of whose positions (B, C, H, W) only the mean is computed: (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)).mean(dim=(1, 2)))
        return x.mean(dim=(2, 3), keepdim=True) + self.drop_path(y[:, :, None, None])


def trim_last_block(model: nn.Module) -> bool:
    """Let the last block compute only what the head reads, in place; whether it does. Names in the state dict stay.

    A network whose head or block is another one, or which uses dropout there, stays as it is; so does one whose block turns out
    otherwise, as it may with another version of timm.
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
    """The last block and what to make of it; None where the head reads something else, or the block is of another kind."""
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
    """Whether both give the same of random input."""
    generator = torch.Generator().manual_seed(0)
    try:
        block = probe_copy(block).to("cpu", torch.float32).eval()
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
