"""How far the work has come: one bar for all workers."""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from evaluation.plan import Evaluation

LINE_SECONDS = 60  # between two lines where the output is no terminal


class ProgressDisplay:
    """One bar for all workers; where the output is no terminal, a line now and then."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._is_terminal = sys.stderr.isatty()
        self._chunks = [0, 0]
        self._last_line = 0.0

    def start(self, *, images: tuple[int, int], chunks: int) -> None:
        """`images`: done before, and all; `chunks`: still to do."""
        done, total = images
        self._chunks = [0, chunks]
        silent = None if self._is_terminal else io.StringIO()
        self._bar = tqdm(
            total=total, initial=done, unit="img", smoothing=0, leave=False, file=silent, dynamic_ncols=True
        )

    def begin(self, slots: Sequence[Any]) -> None:
        """Say what is about to happen, from now on: free GPUs may have been waited for."""
        self._bar.start_t = self._bar.last_print_t = time.time()
        where = ", ".join(f"{count} × {device}" for device, count in Counter(slot.device for slot in slots).items())
        self.say(f"{self._chunks[1]} chunks to do; workers of this process: {where}")

    def chunk_done(
        self, evaluation: Evaluation, records: Iterable[Mapping[str, Any]], record: Mapping[str, Any]
    ) -> None:
        """Count a chunk; `records`: all of its evaluation so far."""
        verdicts = [broken for some in records for broken in some["broken_by"]]
        self._chunks[0] += 1
        self._bar.set_description_str(str(evaluation), refresh=False)
        robust = f"{100 * verdicts.count('') / max(len(verdicts), 1):.1f}%"
        self._bar.set_postfix_str(f"chunks {self._chunks[0]}/{self._chunks[1]}, robust {robust}", refresh=False)
        self._bar.update(len(record["positions"]) + len(record["unreadable"]))
        self._print_line(always=self._chunks[0] == self._chunks[1])

    def now(self, chunk: int, attack: str) -> None:
        """Show what a worker has begun."""
        if self._bar is not None:
            done, total = self._chunks
            self._bar.set_postfix_str(f"chunks {done}/{total}, chunk {chunk} at {attack}", refresh=self._is_terminal)
            self._print_line()

    def _print_line(self, *, always: bool = False) -> None:
        """Where the output is no terminal: the bar as a line, now and then."""
        now = time.monotonic()
        if not self._is_terminal and (always or now - self._last_line >= LINE_SECONDS):
            self._last_line = now
            print(self._bar, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print without tearing the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
