"""The run folder: params.json, log, weights, TensorBoard events, curves. Only the first process writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from common.config import PROVENANCE_KEY, TrainConfig, config_to_dict
from common.files import set_aside, writable, write_atomically
from training.curves import draw_curves


class RunFolder:
    """Everything a run leaves behind, in `<logging.folder>/<run name>`.

    `log` holds one JSON object a line: records with `step` (per step, by `logging.log_level`) and records with `top1` (per
    validation). Non-finite numbers are written as strings, which JSON has no numbers for. A folder of an earlier run of the
    same name is renamed, never overwritten.
    """

    def __init__(self, config: TrainConfig, provenance: Mapping[str, Any]) -> None:
        self.path = Path(config.logging.folder) / config.run_name
        self.keep = config.logging.keep
        self._saved: dict[str, list[Path]] = {"weights": [], "weights_ema": []}
        with writable("logging.folder", self.path):
            self.set_aside = set_aside(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            params = config_to_dict(config) | {PROVENANCE_KEY: dict(provenance)}
            write_atomically(self.path / "params.json", lambda file: file.write(json.dumps(params, indent=2).encode()))
            self._log = open(self.path / "log", "a", buffering=1)  # a line at a time
            self._events = SummaryWriter(str(self.path))
        if config.misc.notes:
            self._events.add_text("notes", config.misc.notes)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line to the log, and its numbers to the TensorBoard events."""
        self._log.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        step, group = record.get("step", 0), "epoch" if "top1" in record else "step"
        for key, value in record.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                self._events.add_scalar(f"{group}/{key}", value, step)

    def save_weights(self, networks: Mapping[str, nn.Module], epoch: int) -> None:
        """Write weights_<epoch>.pt and weights_ema_<epoch>.pt; delete the oldest beyond `logging.keep`."""
        for kind, network in networks.items():
            name = "weights" if kind == "raw" else "weights_ema"
            path = self.path / f"{name}_{epoch}.pt"
            state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
            write_atomically(path, lambda file, state=state: torch.save(state, file))
            saved = self._saved[name]
            saved.append(path)
            while self.keep and len(saved) > self.keep:
                saved.pop(0).unlink(missing_ok=True)

    def close(self) -> None:
        """Flush everything and draw the curves."""
        self._log.close()
        self._events.close()
        draw_curves(self.path / "log", self.path / "curves.png")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
