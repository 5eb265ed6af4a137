"""Copies of batches to the GPU while it computes, and the part of the augmentation that runs there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from data.augment import augment
from data.loader import Batch
from data.pipeline import to_unit


def prefetch(
    batches: Iterable[Batch],
    device: torch.device,
    on_gap: Callable[[torch.Event, torch.Event], None] | None = None,
) -> Iterator[Batch]:
    """Yield the batches with images and labels on `device`, copied on a separate stream; on a CPU the batches themselves.

    The host is ahead of the GPU: it requests the next batch when the previous step has only been queued. The copy (from
    pinned memory) therefore overlaps with that step. The stream of the caller waits for the copy, the host does not.

    `on_gap` receives two timed events of each batch, between which the GPU only waits for that batch.
    """
    if device.type == "cpu":
        yield from batches
        return
    module, stream, batches = torch.get_device_module(device), _copy_stream(device), iter(batches)
    consumer = module.current_stream(device)
    while True:
        before = consumer.record_event(module.Event(enable_timing=True))
        if (batch := next(batches, None)) is None:
            return
        with module.stream(stream):
            x, y = batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True)
        consumer.wait_stream(stream)
        if on_gap is not None:
            on_gap(before, consumer.record_event(module.Event(enable_timing=True)))
        for tensor in (x, y):
            tensor.record_stream(consumer)  # its memory is reused only when the consumer's work on it is done
        yield batch._replace(x=x, y=y)


@cache
def _copy_stream(device: torch.device) -> torch.Stream:
    """Return one stream for all epochs, because only the stream that allocated memory reuses it."""
    return torch.get_device_module(device).Stream(device)


def finish_augmentation(batch: Batch, *, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] on the device, in the requested memory format, after the changes in `draws`."""
    x = batch.x.to(device, non_blocking=True)
    if batch.draws is not None:
        x = augment(x, batch.draws)
    return to_unit(x, dtype, torch.channels_last if channels_last else torch.contiguous_format)
