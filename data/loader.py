"""Batches for training and evaluation: order, worker processes, and images that cannot be decoded.

The order is a function of (seed, epoch), a sample's augmentation of (seed, epoch, index). Neither the number of workers
nor what ran before changes a batch, and n ranks together see what one rank sees with n times the batch size. Streams
(`StreamSource`) are as repeatable as timm's readers: for the same numbers of ranks and workers.

Worker processes are DataLoader's. A worker that dies (usually because the kernel kills it for lack of memory) ends the
run with DataLoader's error, and the run resumes exactly.
"""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from common.errors import UserError
from common.forkserver import end_children, end_with_parent, signals_blocked
from common.seeding import derive_seed
from data.augment import Draws, concatenated
from data.decoding import DECODE_ERRORS
from data.pipeline import FAST, PillowPipeline, Pipeline, TransformError, train_pipeline
from data.source import Source, StreamSource
from data.transforms import eval_transform

_SHARED_MEMORY = "/dev/shm"  # docker gives a container 64 MB of it
_MAX_REPLACEMENTS = 64  # this many broken images in a row are an error

Failure = tuple[str, str]  # name of an image, reason why it cannot be decoded
SampleKey = tuple[int, int, int]  # epoch, index in the source, image size


def spread_indices(length: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over 0 … length − 1 (all if count ≥ length): a fixed subset of every class."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def print_warning(text: str) -> None:
    """Write `text` to stderr, above a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def dead_worker(error: BaseException) -> str | None:
    """Return DataLoader's message about a worker process that has ended; None if this is another error."""
    texts = [str(e) for e in (error.__cause__, error) if isinstance(e, RuntimeError)]  # the cause has the signal
    said = next((text.split(". ")[0] for text in texts if text.startswith("DataLoader worker")), None)
    if said is not None and "Bus error" in said:  # a write into full shared memory
        return f"{said}: {_full_shared_memory()}"
    return said


def _full_shared_memory() -> str:
    size = shutil.disk_usage(_SHARED_MEMORY).total / 2**20
    return (
        f"{_SHARED_MEMORY}, the shared memory through which loader workers pass on images, is full ({size:.0f} MB in total); "
        "give the container more (docker run --shm-size=16g, or --ipc=host), or use fewer workers, or none (num_workers=0)"
    )


class Batch(NamedTuple):
    """Images and labels of one rank.

    `x` (B, 3, size, size): float32 in [0, 1], or uint8 from the fast pipeline, to which `draws` must still be applied
    (`data.augment.augment`); `y` int64 (B,); `index` int64 (B,), positions in the source, −1 in streams; `failures`: each image
    that could not be decoded.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    failures: list[Failure]
    draws: Draws | None = None


class TrainLoader:
    """Micro-batches of one rank, epoch by epoch.

    Step s uses the s-th global batch, `world_size * batch_size * accum` samples of the epoch's order. An incomplete last
    batch is dropped. Micro-batch a of rank r is block `a * world_size + r` of `batch_size` samples. An image that cannot
    be decoded is replaced by the next one of the source; `Batch.index` contains the index of the replacement.

    Attributes:
        steps_per_epoch: optimiser steps.
        repeatable_for_any_workers: whether an epoch's global order is the same for any numbers of workers and ranks, so
            that a run can resume with other numbers in the middle of an epoch. False for streams.
    """

    def __init__(
        self,
        source: Source | StreamSource,
        *,
        augmentation: int,
        batch_size: int,
        pipeline: str = FAST,
        accum: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        min_scale: float = 0.08,
        flip: float = 0.5,
        crop_pct: float = 0.875,
        pin_memory: bool = False,
    ) -> None:
        """Set the loader up; worker processes start with the first epoch and stay.

        Args:
            source: the training images.
            augmentation, min_scale, flip, crop_pct: as in `train_transform`.
            batch_size: samples of one rank in one micro-batch.
            pipeline: "fast" or "timm", see `data.pipeline`.
            accum: micro-batches per step.
            seed: of order and augmentation.
            rank, world_size: of this process among those that train together.
            num_workers: worker processes; 0 loads in this process.
            pin_memory: put batches into page-locked memory, from which a GPU can copy them asynchronously.

        Raises:
            UserError: the source is smaller than one global batch, or has fewer shards than there are workers.
        """
        global_batch = world_size * batch_size * accum
        self.steps_per_epoch = len(source) // global_batch
        if not self.steps_per_epoch:
            raise UserError(
                f"batch_size: a step takes {global_batch} images ({batch_size} × {accum} micro-batches × "
                f"{world_size} processes), but the training set has only {len(source)}."
            )
        readers = world_size * max(num_workers, 1)
        if isinstance(source, StreamSource) and source.shards is not None and source.shards < readers:
            raise UserError(
                f"num_workers: {source.spec} has {source.shards} shards, expected at least one for each of the "
                f"{readers} loading processes ({max(num_workers, 1)} × {world_size} processes)."
            )
        self.repeatable_for_any_workers = not isinstance(source, StreamSource)
        self._source, self._seed, self._batch_size, self._accum = source, seed, batch_size, accum
        self._rank, self._world_size = rank, world_size
        self._make_pipeline = partial(
            train_pipeline, pipeline, augmentation, min_scale=min_scale, flip=flip, crop_pct=crop_pct
        )
        self._workers = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._images: DataLoader | None = None
        if self.repeatable_for_any_workers:
            images = _Images(source, self._make_pipeline, seed, tries=_MAX_REPLACEMENTS)
            self._sampler = _EpochKeys()
            kept = {"persistent_workers": num_workers > 0}
            self._images = _data_loader(images, batch_sampler=self._sampler, **kept, **self._workers)

    def epoch(self, epoch: int, size: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield micro-batches of `size` pixels, `accum` for each step from `start_step` on.

        Drop an epoch's iterator before using the next one. A stream has to read everything before `start_step`.

        Raises:
            UserError: too many images in a row cannot be decoded, or a stream cannot be read.
            RuntimeError: a worker process died.
        """
        if isinstance(self._source, StreamSource):
            yield from self._stream(self._source, epoch, size, start_step)
            return
        self._sampler.keys = self._keys(epoch, size, start_step * self._accum)
        for batch in _batches_of(self._images):
            if len(batch.y) < self._batch_size:
                name, reason = batch.failures[-1]
                count = f"{_MAX_REPLACEMENTS} training images in a row"
                raise UserError(f"{count} cannot be decoded, the last is {name} ({reason}).")
            yield batch

    def close(self) -> None:
        """End the worker processes as soon as no epoch's iterator is left."""
        self._images = None

    def _keys(self, epoch: int, size: int, first: int) -> Iterator[list[SampleKey]]:
        """Return the keys of this rank's micro-batches from number `first` of the epoch on."""
        bits = np.random.MT19937(derive_seed("order", self._seed, epoch))
        order = np.random.RandomState(bits).permutation(len(self._source))  # numpy never changes RandomState's results
        # No reference to this loader: with a reference cycle, the workers would outlive it.
        rank, world_size, batch_size = self._rank, self._world_size, self._batch_size
        micro_steps = range(first, self.steps_per_epoch * self._accum)
        starts = ((micro_step * world_size + rank) * batch_size for micro_step in micro_steps)
        return ([(epoch, index, size) for index in order[start : start + batch_size].tolist()] for start in starts)

    def _stream(self, source: StreamSource, epoch: int, size: int, start_step: int) -> Iterator[Batch]:
        # Workers and readers are new in each epoch, so that nothing depends on earlier epochs.
        reader = {"seed": derive_seed("stream", self._seed, epoch) % 2**31, "batch_size": self._batch_size}
        reader |= {"training": True, "rank": self._rank, "world_size": self._world_size}
        key = ("sample", self._seed, epoch, self._rank)
        samples = _Stream(source, self._make_pipeline(size), key, reader, workers=self._workers["num_workers"])
        loader = _data_loader(
            samples,
            seed=derive_seed("workers", self._seed, epoch, self._rank),
            batch_size=self._batch_size,
            drop_last=True,
            **self._workers,
        )
        came, wanted = 0, self.steps_per_epoch * self._accum
        for batch in islice(_batches_of(loader), wanted):
            came += 1
            if came > start_step * self._accum:
                yield batch
        if came < wanted:  # other ranks would wait for this one for ever
            raise RuntimeError(f"{source.spec}: the stream ended after {came} of {wanted} batches.")


class EvalLoader:
    """Batches of each sample once, on one of the ranks: rank r has the positions r, r + world_size, … of the images.

    Images that cannot be decoded are skipped and listed in `failures`, so a batch may be smaller than `batch_size`, even empty.
    """

    def __init__(
        self,
        source: Source | StreamSource,
        *,
        size: int,
        batch_size: int,
        crop_pct: float = 0.875,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        keep_workers: bool = False,
        pin_memory: bool = False,
        on_warning: Callable[[str], None] = print_warning,
        upright: bool = True,
    ) -> None:
        """Set up; arguments as in `TrainLoader`, `eval_transform`, `decode`; `keep_workers`: until `close` (not for streams)."""
        workers = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._source, self._size, self._batch_size, self._rank, self._world_size = (
            source,
            size,
            batch_size,
            rank,
            world_size,
        )

        def evaluation(size: int) -> Pipeline:
            return PillowPipeline(eval_transform(size, crop_pct, interpolation, crop_mode), upright=upright)

        if isinstance(source, StreamSource):
            # Every rank reads the whole stream: timm's own sharding would repeat or drop samples at the end.
            reader = {"training": False, "seed": 0, "batch_size": batch_size, "rank": 0, "world_size": 1}
            samples = _Stream(source, evaluation(size), ("eval",), reader, (rank, world_size), workers=num_workers)
            loader = _data_loader(samples, batch_size=batch_size, **workers)
            # The warning is the same on every rank, so rank 0 alone gives it.
            self._whole = partial(_whole_stream, loader, source, samples.came, on_warning if rank == 0 else None)
        else:
            images = _Images(source, evaluation, seed=0, tries=1)
            self._sampler = _EpochKeys()
            kept = {"persistent_workers": keep_workers and num_workers > 0}
            self._images: DataLoader | None = _data_loader(images, batch_sampler=self._sampler, **kept, **workers)

    def batches(self, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Return the batches of the images `indices`, by default of all.

        Raises:
            ValueError: `indices` for a stream.
            UserError: a stream cannot be read.
            RuntimeError: a worker process died.
        """
        if isinstance(self._source, StreamSource):
            if indices is not None:
                raise ValueError(f"{self._source.spec} is a stream and has no indices")
            return self._whole()
        shown = range(len(self._source)) if indices is None else indices
        keys = [(0, int(index), self._size) for index in shown[self._rank :: self._world_size]]
        self._sampler.keys = iter([keys[i : i + self._batch_size] for i in range(0, len(keys), self._batch_size)])
        return _batches_of(self._images)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def close(self) -> None:
        """End the worker processes as soon as no iterator is left."""
        self._images = None


class _EpochKeys:
    """A batch sampler whose epoch can change while the workers live."""

    def __init__(self) -> None:
        self.keys: Iterator[list[SampleKey]] = iter(())

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return self.keys


class _Images(Dataset):
    """SampleKey → batch of one image, or an empty batch if `tries` images from its index on cannot be decoded."""

    def __init__(self, source: Source, make_pipeline: Callable[[int], Pipeline], seed: int, tries: int) -> None:
        self._source, self._make_pipeline, self._seed, self._tries = source, make_pipeline, seed, tries
        self._pipelines: dict[int, Pipeline] = {}  # by size

    def __getitem__(self, key: SampleKey) -> Batch:
        epoch, index, size = key
        if size not in self._pipelines:
            self._pipelines[size] = self._make_pipeline(size)
        failures = []
        for i in range(index, index + self._tries):
            i %= len(self._source)
            try:
                encoded, label = self._source.read(i)
                x, draws = self._pipelines[size](encoded, ("sample", self._seed, epoch, index))
            except DECODE_ERRORS as error:
                failures.append((self._source.name(i), f"{type(error).__name__}: {error}"))
            except TransformError as error:
                raise RuntimeError(f"cannot transform {self._source.name(i)}") from error.__cause__
            else:
                return _batch_of_one(x, draws, label, i, failures)
        return Batch(torch.empty(0, 3, size, size), *torch.empty(2, 0, dtype=torch.int64), failures)


class _Stream(IterableDataset):
    """Batches of one image each, from the positions `part[0]`, `part[0] + part[1]`, … of what this worker reads.

    `came`: number of samples that each worker has read, shown or not.
    """

    def __init__(
        self,
        source: StreamSource,
        pipeline: Pipeline,
        key: tuple[int | str, ...],
        reader: dict[str, Any],
        part: tuple[int, int] = (0, 1),
        *,
        workers: int,
    ) -> None:
        self._source, self._pipeline, self._key, self._reader, self._part = source, pipeline, key, reader, part
        self.came = torch.zeros(max(workers, 1), dtype=torch.int64).share_memory_()  # workers write to it

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = self._counted(self._source.samples(num_workers=workers, **self._reader), number)
        for position, (image, label) in islice(samples, self._part[0], None, self._part[1]):
            try:
                x, draws = self._pipeline(image, (*self._key, number, position))
            except TransformError as error:
                name = f"{self._source.spec}, worker {number}, position {position}"
                raise RuntimeError(f"cannot transform {name}") from error.__cause__
            yield _batch_of_one(x, draws, label, -1, [])

    def _counted(
        self, samples: Iterator[tuple[Image.Image, int]], number: int
    ) -> Iterator[tuple[int, tuple[Image.Image, int]]]:
        self.came[number] = 0
        for position, sample in enumerate(samples):
            self.came[number] = position + 1
            yield position, sample


def _batch_of_one(x: Tensor, draws: Draws | None, label: int, index: int, failures: list[Failure]) -> Batch:
    return Batch(x[None], torch.tensor([label]), torch.tensor([index]), failures, draws)


def _collate(batches: list[Batch]) -> Batch:
    x, y, index, failures, draws = zip(*batches, strict=True)
    draws = [some for some in draws if some is not None]
    failures = [failure for some in failures for failure in some]
    batch = Batch(torch.cat(x), torch.cat(y), torch.cat(index), failures, concatenated(draws) if draws else None)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(batch: Batch) -> None:
    """Put a worker's batch into shared memory. DataLoader's queue would do the same, but an error there is a hang."""
    try:
        for tensor in (batch.x, batch.y, batch.index, *(batch.draws or ())):
            tensor.share_memory_()
    except RuntimeError as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise UserError(f"{_full_shared_memory()}.") from error


def _data_loader(dataset: Dataset, *, seed: int = 0, **options: Any) -> DataLoader:
    # Its own generator, because otherwise it draws from the global one. PyTorch itself gives each worker one thread.
    generator = torch.Generator().manual_seed(seed)
    start = partial(_init_worker, os.getpid())
    if options["num_workers"]:
        _end_workers_at_exit()
    return DataLoader(dataset, collate_fn=_collate, worker_init_fn=start, generator=generator, **options)


def _batches_of(loader: DataLoader) -> Iterator[Batch]:
    workers: list[multiprocessing.Process] = []
    try:
        if loader.num_workers:
            multiprocessing.Lock()  # fails if there is no memory for it; DataLoader would leave a partial iterator and a traceback
        # Only this process reacts to signals: it may want to end its step and write a checkpoint.
        with signals_blocked():
            batches = iter(loader)
        workers = multiprocessing.active_children()
        yield from batches
    except UserError as error:  # from a worker, its message begins with tracebacks
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
    except (OSError, EOFError) as error:
        if loader.num_workers and getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(f"{_full_shared_memory()}.") from error
        if loader.num_workers and (death := _death(workers)):
            raise RuntimeError(death) from error
        raise


def _death(workers: list[multiprocessing.Process], *, seconds: float = 5.0) -> str | None:
    """Return a message about the death of one of the workers, in DataLoader's words.

    A worker that dies while it passes on a batch breaks a connection a moment before its exit code is visible. DataLoader
    checks too early, and under load its signal handler sometimes reports nothing (1 of 300 kills).
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for worker in workers:
            if code := worker.exitcode:
                how = (
                    f"is killed by signal: {signal.strsignal(-code)}"
                    if code < 0
                    else f"exited unexpectedly, status {code}"
                )
                return f"DataLoader worker (pid {worker.pid}) {how}"
        time.sleep(0.02)
    return None


def _whole_stream(
    loader: DataLoader, source: StreamSource, came: Tensor, on_warning: Callable[[str], None] | None
) -> Iterator[Batch]:
    """Yield the batches, then warn if fewer samples `came` than the stream announces."""
    yield from _batches_of(loader)
    if on_warning is not None and came.sum() < len(source):
        on_warning(
            f"{source.spec} announces {len(source)} images, but {int(came.sum())} were read, and only these count. Shards end "
            "early, or contain images that cannot be decoded, or the number is wrong."
        )


@cache
def _end_workers_at_exit() -> None:
    atexit.register(end_children)


def _init_worker(parent: int, _: int) -> None:
    end_with_parent(parent)
