"""Benchmark of decoding and augmentation of training images, on one core and on the training device.

    python -m benchmarks.loader --data FOLDER_OR_TAR [--images 240] [--repeats 7] [--quick] [--json FILE]

`--data`: photos as for `data.train_dataset`. All parts run interleaved, in one process with one thread; ratios are taken
within a repetition. Times are CPU times, so other programs on the machine have little effect. Augmentation is `heavy` at
224 pixels, without mixup, which is the same for both pipelines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks import harness
from benchmarks.harness import Row, main, options, row
from common.errors import UserError, blame
from data.augment import Draws, augment, concatenated, draw, draw_crop, generator
from data.datasets import open_source
from data.decoding import DECODE_ERRORS, CropDecoder, decode
from data.loader import TrainLoader
from data.pipeline import Pipeline, to_unit, train_pipeline
from data.source import Source
from data.transforms import HEAVY

SIZE, BATCH, WORKERS = 224, 80, 16
CROPS = 1000
GPU_BATCH, GPU_SECONDS = 256, 2.0
SETTINGS = {"min_scale": 0.08, "flip": 0.5, "crop_pct": 0.875}
Batch = tuple[torch.Tensor, Draws]


def encoded_images(source: Source, count: int) -> list[bytes]:
    """Return `count` encoded images that can be decoded; start again at the first if there are fewer."""
    files = []
    for i in range(min(len(source), count)):
        image = source.image(i)
        if isinstance(image, bytes):
            try:
                decode(image)
            except DECODE_ERRORS:
                continue
            files.append(image)
    if not files:
        raise UserError("--data: expected image files, but none can be decoded.")
    return [files[i % len(files)] for i in range(count)]


def timm_part(files: Sequence[bytes], pipeline: Pipeline, repeat: int) -> torch.Tensor:
    return torch.stack([pipeline(file, ("benchmark", repeat, i))[0] for i, file in enumerate(files)])


def workers_part(files: Sequence[bytes], pipeline: Pipeline, repeat: int) -> Batch:
    shown = [pipeline(file, ("benchmark", repeat, i)) for i, file in enumerate(files)]
    return torch.stack([x for x, _ in shown]), concatenated([draws for _, draws in shown])


def device_part(batch: Batch) -> torch.Tensor:
    return to_unit(augment(*batch), torch.float32)


def timed(action: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    begin = time.process_time()
    result = action(*arguments)
    return time.process_time() - begin, result


def measure_cpu(files: list[bytes], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each part for all files, one value per repetition. The parts are interleaved, batch by batch."""
    timm, fast = (train_pipeline(name, HEAVY, SIZE, **SETTINGS) for name in ("timm", "fast"))
    seconds: dict[str, list[float]] = {name: [] for name in ("timm", "workers", "device")}
    for repeat in range(-1, repeats):
        sums = dict.fromkeys(seconds, 0.0)
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            sums["timm"] += timed(timm_part, some, timm, repeat)[0]
            took, batch = timed(workers_part, some, fast, repeat)
            sums["workers"] += took
            sums["device"] += timed(device_part, batch)[0]
        if repeat >= 0:  # the first repetition is a warm-up
            for name, value in sums.items():
                seconds[name].append(value)
    return seconds


def cpu_rows(seconds: dict[str, list[float]], images: int, *, counts: bool) -> list[Row]:
    timm, workers, device = (np.array(seconds[name]) for name in ("timm", "workers", "device"))
    speed = "images/s per core"
    return [
        row("timm_heavy", list(images / timm), speed, note="data.pipeline=timm: all in the workers"),
        row("workers", list(images / workers), speed, note="data.pipeline=fast: decode, crop, draw"),
        row("device_on_cpu", list(images / device), speed, note="flip, RandAugment, erasing, to float32"),
        row("workers_part", list(timm / workers), "times timm_heavy", ">= 2.5", counts=counts),
        row("all_on_cpu", list(timm / (workers + device)), "times timm_heavy", ">= 1.7", counts=counts),
    ]


def device_row(*, images: int = GPU_BATCH, seconds: float = GPU_SECONDS) -> Row:
    """Measure the device's part on random images, as in training: draws on the host, no sync within a batch."""
    if not torch.cuda.is_available():
        return row("device_part", None, "images/s", ">= 20000", note="needs a GPU")
    device, rng = torch.device("cuda"), generator("device_part")
    draws = concatenated([draw(rng, SIZE, flip=0.5, heavy=True) for _ in range(images)])
    batch = torch.randint(0, 256, (images, 3, SIZE, SIZE), dtype=torch.uint8, device=device), draws
    calls = max(int(seconds / harness.timed(lambda: device_part(batch), device, times=3).wall), 1)
    figures = [images / harness.timed(lambda: device_part(batch), device, times=calls).wall for _ in range(3)]
    return row("device_part", figures, "images/s", ">= 20000", note=torch.cuda.get_device_name())


def crop_differences(files: list[bytes], count: int) -> np.ndarray:
    """Return the mean absolute difference of `count` random crops from those of Pillow, in levels of 255."""
    decoder, differences = CropDecoder(), []
    for i in range(count):
        rng, boxes = generator("parity", i), []

        def choose(height: int, width: int, rng: Any = rng, boxes: list = boxes) -> Any:
            boxes.append(draw_crop(rng, height, width, min_scale=SETTINGS["min_scale"]))
            return boxes[0]

        x = decoder(files[i % len(files)], choose, SIZE)
        top, left, height, width = boxes[0]
        crop = decode(files[i % len(files)]).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.int16)
        differences.append(np.abs(x.permute(1, 2, 0).numpy().astype(np.int16) - expected).mean())
    return np.array(differences)


def parity_rows(differences: np.ndarray) -> list[Row]:
    note = f"{len(differences)} random crops at {SIZE} pixels against Pillow's decoder and bicubic"
    return [
        row("crop_parity", [float(differences.mean())], "levels of 255, mean", "<= 2", note=note),
        row("crop_parity_p99", [float(np.percentile(differences, 99))], "levels of 255, 99th percentile", "<= 6"),
    ]


def workers_memory(source: Source, workers: int, batches: int) -> float:
    """Return the peak memory in GiB of this process and its workers while they load `batches` batches (fast pipeline)."""
    loader = TrainLoader(Repeated(source, batches * BATCH), augmentation=HEAVY, batch_size=BATCH, num_workers=workers)
    most = 0
    for _ in loader.epoch(0, SIZE):
        family = [psutil.Process(), *psutil.Process().children()]
        most = max(most, sum(process.memory_full_info().pss for process in family))
    return most / 2**30


class Repeated(Source):
    """Source of `count` images that repeats the images of another source."""

    def __init__(self, source: Source, count: int) -> None:
        super().__init__([source.labels[i % len(source)] for i in range(count)], source.class_names)
        self._source = source

    def image(self, i: int) -> Any:
        return self._source.image(i % len(self._source))

    def name(self, i: int) -> str:
        return self._source.name(i % len(self._source))


def measure(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(1)
    with blame("--data"):
        source = open_source(arguments.data, split="train")
    if not isinstance(source, Source):
        raise UserError(f"--data: expected a folder or tar of photos, got the stream {arguments.data}.")
    quick = arguments.quick
    files = encoded_images(source, 16 if quick else arguments.images)
    print(f"{len(files)} photos of {np.mean([len(file) for file in files]) / 1000:.0f} kB …", file=sys.stderr)
    rows = cpu_rows(measure_cpu(files, 1 if quick else arguments.repeats), len(files), counts=not quick)
    rows.append(device_row())
    rows += parity_rows(crop_differences(files, 20 if quick else CROPS))
    workers = 2 if quick else WORKERS
    memory = workers_memory(source, workers, batches=3 * workers)
    rows.append(row("memory", [memory], f"GiB, {workers} workers, batches of {BATCH}", "<= 8", counts=not quick))
    yield rows


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options("Benchmark of decoding and augmentation of training images.")
    parser.add_argument("--data", required=True, help="photos: a folder or tar of class folders")
    parser.add_argument("--images", type=int, default=240, help="photos per repetition")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(measure, parse(sys.argv[1:])))
