"""Profile of a few steps (`training.profile_steps`), in the run folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from common.errors import cause_of
from training.console import say, warn

FOLDER = "profile"
# Steps before: compilation, choice of algorithms, growth of the memory pool.
SKIPPED = 10
ROWS = 60


class StepProfiler:
    """Profiles consecutive steps of a process and writes to `folder`/profile.

    - trace.json.gz: operators, kernels and copies in time, for ui.perfetto.dev
    - operators.txt: the operators that took the most time
    - memory.pickle, on CUDA only: every allocation with its stack, for pytorch.org/memory_viz

    Args:
        folder: the run folder; None: this process is not profiled.
        steps: number of steps; 0: none are profiled.
        left: steps left in the run; fewer steps are skipped before the profile if there are not enough.
    """

    def __init__(self, folder: Path | None, *, steps: int, left: int, device: torch.device) -> None:
        self._device, self._profiler, self._folder = device, None, folder
        if folder is None or not steps:
            return
        self._skipped = max(min(SKIPPED, left - steps - 2), 0)  # one starts the profiler, one warms it up
        self._done, self._last = 0, self._skipped + 2 + steps
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=self._skipped, wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )

    def step(self) -> None:
        """Count a finished step; the profile begins and ends between two steps."""
        if self._profiler is None:
            return
        self._done += 1
        if self._done == 1:
            self._profiler.start()
        else:
            self._profiler.step()
        if self._device.type == "cuda" and self._done == self._skipped + 2:
            torch.cuda.memory._record_memory_history(stacks="python")
        if self._done == self._last:
            self._profiler.stop()
            self._profiler = None

    def close(self) -> None:
        """End an unfinished profile."""
        if self._profiler is not None and self._done:
            self._profiler.stop()
            warn(
                f"training.profile_steps: the run ended before its step {self._last}, so there is no complete profile."
            )
        self._profiler = None

    def _write(self, profiled: profile) -> None:
        if self._done < self._last:
            return
        folder = self._folder / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            profiled.export_chrome_trace(str(folder / "trace.json.gz"))
            order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            (folder / "operators.txt").write_text(profiled.key_averages().table(sort_by=order, row_limit=ROWS))
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        except (OSError, RuntimeError) as error:
            warn(f"{folder}: the profile cannot be written ({cause_of(error)}); training continues.")
        else:
            say(f"profile: {folder}")
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
