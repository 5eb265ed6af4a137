"""Batches on their way to the GPU while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from data.loader import Batch


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with images and labels on `device`, copied on a stream of their own; on a CPU the batches themselves.

    The host is ahead of the GPU: it asks for the next batch when the step before has only been queued, so the copy (from
    pinned memory) runs beside that step. The stream of the caller waits for the copy, the host does not.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            x, y = batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True)
        consumer = torch.cuda.current_stream(device)
        consumer.wait_stream(stream)
        for tensor in (x, y):
            tensor.record_stream(consumer)  # its memory is used again only when the consumer's work on it is done
        yield batch._replace(x=x, y=y)
