"""Use of the device in training: model FLOPs per second, their share of the device's peak rate (MFU), and peak memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from attacks.registry import forward_equivalents
from common.processes import Processes
from training.config import TrainConfig
from training.state import TrainState

# Dense matrix products, from NVIDIA's data sheets: TFLOP/s in float16 and bfloat16, in TF32, and in float32. The first entry
# whose name occurs in the device's name counts.
PEAK_TFLOPS = {
    "B200": (2250.0, 1100.0, 75.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 418.0, 60.0),
    **dict.fromkeys(("H100", "H200", "GH200"), (989.0, 495.0, 67.0)),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "V100": (125.0, 15.7, 15.7),
}
COLUMN = {"fp16": 0, "bf16": 0, "tf32": 1, "fp32": 2}


class Efficiency:
    """Turns the speed of a run into numbers for its log."""

    def __init__(self, config: TrainConfig, state: TrainState, processes: Processes) -> None:
        self._state, self._device, self._processes = state, processes.device, processes
        self._passes = forward_equivalents(config.adv, reused=state.reuses_forward)
        self._flops: dict[int, int | None] = {}  # image size → of a forward pass
        self._peak = peak_flops(name_of(processes.device), config.training.precision)

    def numbers(self, images_per_second: float, *, size: int) -> dict[str, float]:
        """Return what is known of this process's device.

        Args:
            images_per_second: of all processes together.
            size: image size in pixels.

        Returns:
            tflop_per_second: model FLOPs per second of one process, the attack included, in 10¹². Not known for a network with
                frozen parameters, or if the network cannot be traced.
            mfu: their share of the peak rate in the data sheet.
            peak_memory_gib: most memory that tensors took on the device; not for a CPU.
        """
        numbers = {}
        if size not in self._flops:
            trained = all(p.requires_grad for p in self._state.model.parameters())
            self._flops[size] = forward_flops(self._state.model, size) if trained else None
        if flops := self._flops[size]:
            rate = images_per_second / self._processes.world_size * self._passes * flops
            numbers["tflop_per_second"] = round(rate / 1e12, 4)
            if self._peak is not None:
                numbers["mfu"] = round(rate / self._peak, 4)
        if self._device.type != "cpu":
            used = torch.get_device_module(self._device).max_memory_allocated(self._device)
            numbers["peak_memory_gib"] = round(used / 2**30, 2)
        return numbers


def forward_flops(model: nn.Module, size: int) -> int | None:
    """Return the FLOPs of a forward pass of one image of `size` pixels; None if the network cannot be traced.

    Matrix products, convolutions and attention are counted, a multiply-add as two. Nothing is computed.
    """
    values = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: torch.empty_like(value, device="meta") for name, value in values}
    dtype, in_training = next(model.parameters()).dtype, [module for module in model.modules() if module.training]
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, tensors, torch.empty(1, 3, size, size, device="meta", dtype=dtype))
    except Exception:  # of any type: networks of timm and torchvision may do what meta tensors cannot
        return None
    finally:
        for module in in_training:
            module.training = True
    return counter.get_total_flops()


def name_of(device: torch.device) -> str:
    """Return the name of a GPU; empty for a CPU."""
    return torch.get_device_module(device).get_device_name(device) if device.type != "cpu" else ""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the FLOP/s in the data sheet of a GPU, for `training.precision`; None for an unknown GPU or float64."""
    rates = next((rates for name, rates in PEAK_TFLOPS.items() if name in device_name), None)
    return None if rates is None or precision not in COLUMN else rates[COLUMN[precision]] * 1e12
