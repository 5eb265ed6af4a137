"""Training step of the published design, a baseline for this implementation; written from a description of the design.

The step runs eagerly, on a GPU in float16 with loss scaling. The attack runs on the trained network, switched to eval mode and
back. It indexes with boolean masks and reads values back to the host at every update. The stem's channel LayerNorm reduces over
the channels of NCHW tensors. The EMA is updated on the host at every step. AdamW has PyTorch's default implementation.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.optim import ADAMW_BETAS, parameter_groups
from utils_architecture import ConvStem


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), as reductions over dimension 1; shares the parameters of `norm`."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def with_channel_norms(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose ConvStem, if any, normalises with `ChannelNorm`."""
    model = copy.deepcopy(model)
    for stem in [module for module in model.modules() if isinstance(module, ConvStem)]:
        for name, layer in list(stem.stem.named_children()):
            if isinstance(layer, nn.LayerNorm):
                stem.stem.set_submodule(name, ChannelNorm(layer))
    return model


def published_apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, n_iter: int) -> Tensor:
    """Run APGD for Linf with boolean masks: x (B, C, H, W) in [0, 1], y int64 (B,) → the iterates with the highest loss."""
    mode = model.training
    model.eval()
    every, shortest, shorter = max(int(0.22 * n_iter), 1), max(int(0.06 * n_iter), 1), max(int(0.03 * n_iter), 1)

    def evaluate(x_adv: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        x_adv = x_adv.clone().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            losses = F.cross_entropy(
                model(x_adv).float() if x.dtype == torch.float32 else model(x_adv), y, reduction="none"
            )
        gradient = torch.autograd.grad(losses.sum(), x_adv)[0].detach() if with_gradient else None
        return losses.detach(), gradient

    def project(z: Tensor) -> Tensor:
        return torch.clamp(torch.min(torch.max(z, x - eps), x + eps), 0.0, 1.0)

    losses, gradient = evaluate(x, True)
    x_adv, x_old, x_best, best, gradient_best = x.clone(), x.clone(), x.clone(), losses.clone(), gradient.clone()
    step = torch.full((len(x), 1, 1, 1), 2 * eps, dtype=x.dtype, device=x.device)
    history = torch.zeros(n_iter + 1, len(x), dtype=losses.dtype, device=x.device)
    history[0] = -torch.inf  # the first update counts as an increase
    best_at_check, halved_last, since = best.clone(), torch.ones_like(best, dtype=torch.bool), 0
    for i in range(n_iter):
        z = project(x_adv + step * gradient.sign())
        if i > 0:
            z = project(x_adv + 0.75 * (z - x_adv) + 0.25 * (x_adv - x_old))
        x_old, x_adv = x_adv.clone(), z
        losses, new = evaluate(x_adv, i + 1 < n_iter)
        gradient = new if new is not None else gradient
        better = (losses > best).nonzero().squeeze(1)
        x_best[better], gradient_best[better], best[better] = x_adv[better], gradient[better], losses[better]
        history[i + 1] = losses
        since += 1
        if since == every:
            rises = (history[i + 2 - every : i + 2] > history[i + 1 - every : i + 1]).sum(0)
            halve = (rises <= 0.75 * every) | (~halved_last & (best_at_check >= best))
            if halve.any():
                step[halve] /= 2
                x_adv[halve], gradient[halve] = x_best[halve].clone(), gradient_best[halve].clone()
            halved_last, best_at_check, since = halve, best.clone(), 0
            every = max(every - shorter, shortest)
        float(best.sum())  # read back, as for a printed loss
    model.train(mode)
    return x_best


class PublishedTraining:
    """Network, optimiser, loss scale and EMA of the published design, starting from a copy of `model`.

    Args:
        model: network, on its device and in its memory format.
        arch: name of the architecture, for the weight-decay rule.
        eps, n_iter: radius and steps of the attack (Linf).
    """

    def __init__(self, model: nn.Module, *, arch: str, eps: float, n_iter: int) -> None:
        self.model, self.eps, self.n_iter = with_channel_norms(model), eps, n_iter
        self.device = next(model.parameters()).device
        self.half = self.device.type == "cuda"
        groups = parameter_groups(self.model, arch=arch, weight_decay=0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=ADAMW_BETAS)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.average = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def step(self, x: Tensor, y: Tensor) -> float:
        """Take one step on images (B, 3, H, W) and labels int64 (B,) on the host, and return the loss."""
        x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        y = y.to(self.device, non_blocking=True)
        self.model.train()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.half):
            x = published_apgd(self.model, x, y, eps=self.eps, n_iter=self.n_iter)
            loss = F.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, value in self.model.state_dict().items():
            value = value.detach().cpu()
            if value.is_floating_point():
                self.average[name].mul_(0.9999).add_(value, alpha=1e-4)
            else:
                self.average[name].copy_(value)
        return loss.item()

    def free(self) -> None:
        """Free the gradients, so that they count as memory of this step; the design keeps them until its next step."""
        self.optimizer.zero_grad()
