"""Loaders: order over ranks, epochs and workers; broken images; streams."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import signal
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.forkserver import SIGNALS
from data.augment import concatenated
from data.datasets import open_source
from data.loader import Batch, EvalLoader, TrainLoader, _batches_of, dead_worker
from data.source import Collected, Source, StreamSource
from data.transforms import eval_transform
from tests.data import encoded, picture, write_folder
from tests.helpers.processes import alive, in_a_child, wait_until


class Pictures(Source):
    """`count` pictures in memory, image i of class i."""

    def __init__(self, count: int, broken: Iterable[int] = ()) -> None:
        super().__init__(range(count), [f"class {i}" for i in range(count)])
        self._files = [b"broken" if i in set(broken) else encoded(i) for i in range(count)]

    def image(self, i: int) -> bytes:
        return self._files[i]

    def name(self, i: int) -> str:
        return f"picture {i}"


class Confession(Source):
    """A source without images: the reason why one cannot be decoded describes the process that reads it."""

    def __init__(self) -> None:
        super().__init__([0] * 4, ["a"])

    def image(self, i: int) -> bytes:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        raise ValueError(f"{os.getpid()} {torch.get_num_threads()} {blocked >= set(SIGNALS)}")

    def name(self, i: int) -> str:
        return str(i)


def together(batches: Iterable[Batch]) -> Batch:
    x, y, index, failures, draws = zip(*batches, strict=True)
    failures = [failure for some in failures for failure in some]
    return Batch(torch.cat(x), torch.cat(y), torch.cat(index), failures, concatenated(draws) if draws[0] else None)


def same(a: Batch, b: Batch) -> bool:
    tensors = [[batch.x, batch.y, batch.index, *(batch.draws or ())] for batch in (a, b)]
    return all(map(torch.equal, *tensors)) and a.x.dtype == b.x.dtype


def basic(source: Source | StreamSource, **options: object) -> TrainLoader:
    return TrainLoader(source, **{"augmentation": 0, "batch_size": 2, "seed": 7, **options})


class TestOrder:
    @pytest.mark.parametrize(("pipeline", "dtype"), [("fast", torch.uint8), ("timm", torch.float32)])
    def test_an_epoch_shows_each_sample_once_over_all_ranks(self, pipeline: str, dtype: torch.dtype) -> None:
        source = Pictures(24)
        loaders = [basic(source, pipeline=pipeline, rank=rank, world_size=3) for rank in range(3)]
        assert [loader.steps_per_epoch for loader in loaders] == [4, 4, 4]
        shown = [together(loader.epoch(0, 16)) for loader in loaders]
        everything = together(shown)
        assert sorted(everything.index.tolist()) == list(range(24)) != everything.index.tolist()
        assert torch.equal(everything.y, everything.index)
        assert everything.x.shape == (24, 3, 16, 16) and everything.x.dtype == dtype
        assert everything.y.dtype == everything.index.dtype == torch.int64

    def test_an_incomplete_global_batch_is_dropped(self) -> None:
        loader = basic(Pictures(23), world_size=2, accum=3)  # 12 a step
        batches = list(loader.epoch(0, 8))
        assert loader.steps_per_epoch == 1 and len(batches) == 3
        assert len(set(together(batches).index.tolist())) == 6

    def test_two_ranks_are_one_with_twice_the_batch(self) -> None:
        source = Pictures(20)
        one = list(basic(source, batch_size=4, accum=2).epoch(3, 12))
        two = [list(basic(source, batch_size=2, accum=2, rank=rank, world_size=2).epoch(3, 12)) for rank in (0, 1)]
        assert len(one) == len(two[0]) == len(two[1]) == 4
        for whole, *halves in zip(one, *two, strict=True):
            assert same(whole, together(halves))

    def test_micro_batches_are_the_batch_in_parts(self) -> None:
        source = Pictures(20)
        whole, parts = basic(source, batch_size=4, accum=1), basic(source, batch_size=2, accum=2)
        assert whole.steps_per_epoch == parts.steps_per_epoch
        assert same(together(whole.epoch(1, 12)), together(parts.epoch(1, 12)))

    def test_depends_on_seed_and_epoch_and_not_on_the_past(self) -> None:
        source = Pictures(16)
        loader = basic(source)
        first, second = together(loader.epoch(0, 12)), together(loader.epoch(1, 12))
        assert not torch.equal(first.index, second.index)
        assert not torch.equal(first.x[first.index.argsort()], second.x[second.index.argsort()])  # other crops
        assert same(first, together(loader.epoch(0, 12))) and same(second, together(basic(source).epoch(1, 12)))
        assert not torch.equal(first.index, together(basic(source, seed=8).epoch(0, 12)).index)

    def test_each_sample_has_its_own_draws(self) -> None:
        source = Pictures(8)
        source._files = [encoded(0)] * 8
        shown = together(basic(source).epoch(0, 12))
        assert len({x.sum().item() for x in shown.x}) == 8

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("world_size", [1, 2])
    @pytest.mark.parametrize("accum", [1, 2])
    def test_the_rest_of_an_epoch_is_the_undisturbed_ones(self, accum: int, world_size: int, workers: int) -> None:
        source = Pictures(26)  # two of them are dropped
        for rank in range(world_size):
            options = {"accum": accum, "rank": rank, "world_size": world_size, "augmentation": 1}
            whole = list(basic(source, **options).epoch(1, 12))
            loader = basic(source, **options, num_workers=workers)  # a resumed process has no past
            for start in (2, 1, loader.steps_per_epoch - 1, loader.steps_per_epoch):
                rest = list(loader.epoch(1, 12, start))
                assert len(rest) == (loader.steps_per_epoch - start) * accum
                assert all(same(a, b) for a, b in zip(rest, whole[start * accum :], strict=True))

    def test_another_number_of_processes_keeps_the_blocks(self) -> None:
        """Block = micro-batch × processes + rank: two processes can resume a run of one process with two micro-batches."""
        source = Pictures(26)
        one = list(basic(source, accum=2).epoch(1, 12))
        two = [basic(source, rank=rank, world_size=2) for rank in (0, 1)]
        assert len(one) == 12 and {loader.steps_per_epoch for loader in two} == {6}
        for start in (0, 4):
            ranks = [list(loader.epoch(1, 12, start)) for loader in two]
            blocks = [block for blocks in zip(*ranks, strict=True) for block in blocks]
            assert all(same(a, b) for a, b in zip(blocks, one[2 * start :], strict=True))
        assert all(loader.repeatable_for_any_workers for loader in two)

    def test_order_is_pinned(self) -> None:
        """Another order would make resumed runs skip and repeat samples."""
        assert together(basic(Pictures(12)).epoch(0, 4)).index.tolist() == [9, 3, 4, 11, 7, 5, 2, 0, 6, 8, 10, 1]

    def test_too_few_images(self) -> None:
        with pytest.raises(UserError, match="^batch_size: .*12 images .*2 × 3 .* 2 processes.*only 11"):
            basic(Pictures(11), world_size=2, accum=3)


class TestWorkers:
    @pytest.mark.parametrize("pipeline", ["fast", "timm"])
    def test_their_number_changes_nothing(self, pipeline: str) -> None:
        source, options = Pictures(18, broken=[3, 4, 11]), {"augmentation": 1, "pipeline": pipeline}
        results = [together(basic(source, **options, num_workers=n).epoch(2, 24)) for n in (0, 1, 2)]
        for result in results[1:]:
            assert same(results[0], result) and results[0].failures == result.failures

    def test_they_live_on_while_size_and_epoch_change(self) -> None:
        loader = basic(Pictures(8), num_workers=2)
        fresh = basic(Pictures(8))
        workers = set()
        for epoch, size in enumerate([16, 32, 8]):
            shown = together(loader.epoch(epoch, size))
            assert shown.x.shape == (8, 3, size, size) and same(shown, together(fresh.epoch(epoch, size)))
            workers.add(tuple(worker.pid for worker in loader._images._iterator._workers))
        assert len(workers) == 1

    def test_workers_end_with_close(self) -> None:
        loader = basic(Pictures(16), num_workers=2)
        batches = loader.epoch(0, 12)
        next(batches)
        started = [worker.pid for worker in loader._images._iterator._workers]
        assert all(map(alive, started))
        batches.close()
        loader.close()
        wait_until(lambda: not any(map(alive, started)), seconds=4)  # DataLoader gives up waiting after 5 s

    def test_an_epoch_may_be_left(self) -> None:
        loader = basic(Pictures(16), num_workers=2)
        next(loader.epoch(0, 12))
        assert same(together(loader.epoch(1, 12)), together(basic(Pictures(16)).epoch(1, 12)))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_global_generators_are_left_alone(self, workers: int) -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = random.random(), np.random.rand(), torch.rand(()).item()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        together(basic(Pictures(4), augmentation=1, num_workers=workers).epoch(0, 12))
        together(EvalLoader(Pictures(4), size=8, batch_size=2, num_workers=workers))
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected

    def test_they_leave_signals_to_the_main_process(self) -> None:
        (batch,) = EvalLoader(Confession(), size=8, batch_size=4, num_workers=1)
        pid, threads, blocked = batch.failures[0][1].removeprefix("ValueError: ").split()
        assert pid != str(os.getpid()) and threads == "1" and blocked == "True"

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_images_in_memory_are_the_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        write_folder(tmp_path, {"a": 5, "b": 5})
        plain = open_source(str(tmp_path), split="train")
        memory = open_source(str(tmp_path), split="train", in_memory=True)
        expected = together(basic(plain, augmentation=1).epoch(0, 16))
        start, _ = torch.multiprocessing.get_start_method(), torch.multiprocessing.set_start_method(method, force=True)
        try:
            assert same(expected, together(basic(memory, augmentation=1, num_workers=1).epoch(0, 16)))
        finally:
            torch.multiprocessing.set_start_method(start, force=True)


class Deadly(Pictures):
    """The process that reads image `victim` ends at once."""

    def __init__(self, count: int, *, victim: int, by_signal: bool = True) -> None:
        super().__init__(count)
        self.victim, self.by_signal = victim, by_signal

    def image(self, i: int) -> bytes:
        if i == self.victim:
            os.kill(os.getpid(), signal.SIGKILL) if self.by_signal else os._exit(3)
        return super().image(i)


class Defect(Pictures):
    def image(self, i: int) -> bytes:
        raise ZeroDivisionError(f"picture {i}")


class LateDeath:
    """A DataLoader whose worker breaks a connection 0.3 s before it ends."""

    num_workers = 1

    def __iter__(self) -> Iterator[Batch]:
        context = multiprocessing.get_context("fork")
        context.Process(target=lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGKILL))).start()
        return map(self.broken, range(1))

    def broken(self, _: int) -> Batch:
        raise ConnectionResetError("Connection reset by peer")


def workers() -> list[psutil.Process]:
    return psutil.Process().children()


def death_in(batches: Callable[[], Iterable[Batch]], *, kill: bool) -> str | None:
    """Return a process's message about a worker that dies (or is killed) while it reads the batches."""

    def read() -> str | None:
        try:
            iterator = iter(batches())
            next(iterator)
            if kill:
                workers()[0].kill()
            list(iterator)
        except RuntimeError as error:
            return dead_worker(error)
        return "nothing"

    return in_a_child(read)


class TestDeadWorkers:
    @pytest.mark.parametrize(
        ("by_signal", "how"), [(True, "is killed by signal: Killed"), (False, "exited unexpectedly")]
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_dead_worker_ends_the_epoch_with_its_reason(self, training: bool, by_signal: bool, how: str) -> None:
        source = Deadly(8, victim=3, by_signal=by_signal)

        def batches() -> Iterable[Batch]:
            if training:
                return basic(source, num_workers=2).epoch(0, 8)
            return EvalLoader(source, size=8, batch_size=2, num_workers=2)

        said = death_in(batches, kill=False)
        assert said.startswith("DataLoader worker (pid") and how in said
        assert dead_worker(ValueError("DataLoader worker")) is None

    @pytest.mark.parametrize("training", [True, False])
    def test_killed_worker_of_a_stream_ends_the_epoch(self, tmp_path: Path, training: bool) -> None:
        pytest.importorskip("webdataset", reason="wds/ needs the package webdataset")
        source = open_source(f"wds/{write_shards(tmp_path / 'Shards')}", split="train")

        def batches() -> Iterable[Batch]:
            if training:
                return basic(source, num_workers=2).epoch(0, 8)
            return EvalLoader(source, size=8, batch_size=2, num_workers=2)

        assert "is killed by signal: Killed" in death_in(batches, kill=True)

    def test_message_about_a_worker_that_dies_of_full_shared_memory_says_what_to_change(self) -> None:
        died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that")
        said = dead_worker(died)
        assert said.startswith("DataLoader worker (pid 7) is killed by signal: Bus error: /dev/shm, the shared memory ")
        assert "docker run --shm-size=16g" in said and "(num_workers=0)" in said

    @pytest.mark.parametrize("training", [True, False])
    def test_full_shared_memory_is_one_sentence_and_no_hang(
        self, training: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(tensor: torch.Tensor) -> None:
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
            )

        def read() -> str:
            monkeypatch.setattr(torch.Tensor, "share_memory_", full)
            options = {"batch_size": 2, "num_workers": 2}
            loader = (
                basic(Pictures(8), **options).epoch(0, 8) if training else EvalLoader(Pictures(8), size=8, **options)
            )
            with pytest.raises(UserError) as caught:
                list(loader)
            return str(caught.value)

        said = in_a_child(read)
        assert said.startswith("/dev/shm, the shared memory ") and "\n" not in said
        assert "docker run --shm-size=16g" in said and "(num_workers=0)" in said

    def test_shared_memory_without_room_for_a_lock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(multiprocessing, "Lock", full)
        with pytest.raises(UserError, match="^/dev/shm, the shared memory .* is full"):
            list(basic(Pictures(8), batch_size=2, num_workers=2).epoch(0, 8))

    def test_death_that_shows_after_the_broken_connection_is_reported(self) -> None:
        def read() -> str | None:
            with pytest.raises(RuntimeError) as caught:
                list(_batches_of(LateDeath()))
            return dead_worker(caught.value)

        assert str(in_a_child(read)).endswith("is killed by signal: Killed")

    @pytest.mark.parametrize("training", [True, False])
    def test_defect_of_a_worker_is_raised_as_it_is(self, training: bool) -> None:
        def read() -> str:
            options = {"batch_size": 2, "num_workers": 2}
            loader = basic(Defect(8), **options).epoch(0, 8) if training else EvalLoader(Defect(8), size=8, **options)
            with pytest.raises(ZeroDivisionError, match="picture") as caught:
                list(loader)
            return str(dead_worker(caught.value))

        assert in_a_child(read) == "None"

    def test_workers_outlive_signals_to_all_processes_of_a_job(self) -> None:
        def read() -> bool:
            batches = basic(Pictures(32), num_workers=2).epoch(0, 8)
            shown = [next(batches)]  # the second worker may not have come to its first line yet
            for worker in workers():
                for number in SIGNALS:
                    worker.send_signal(number)
            shown += batches
            return same(together(shown), together(basic(Pictures(32)).epoch(0, 8)))

        assert in_a_child(read)

    def test_workers_end_with_their_killed_parent(self) -> None:
        here, there = multiprocessing.get_context("fork").Pipe()

        def parent() -> None:
            batches = basic(Pictures(64), num_workers=2).epoch(0, 8)
            next(batches)
            there.send([child.pid for child in multiprocessing.active_children()])
            time.sleep(60)

        process = multiprocessing.get_context("fork").Process(target=parent)
        process.start()
        workers = here.recv()
        assert len(workers) == 2 and all(map(alive, workers))
        process.kill()
        process.join()
        wait_until(lambda: not any(map(alive, workers)), seconds=5)


def broken_files() -> dict[str, bytes]:
    jpeg, png = encoded(1, 200, 150, "JPEG"), encoded(1, kind="PNG")
    chunk = b"IHDR" + struct.pack(">2I5B", 40_000, 40_000, 8, 2, 0, 0, 0)  # 1.6 gigapixels
    bomb = png[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
    return {
        "empty": b"",
        "text": b"404 Not Found",
        "jpeg cut": jpeg[: len(jpeg) // 2],
        "jpeg header only": jpeg[:20],
        "png cut": png[:60],
        "png wrong checksum": png[:40] + bytes([png[40] ^ 1]) + png[41:],
        "png bomb": bomb,
        "tiff cut": encoded(1, kind="TIFF")[:50],
        "zeros": bytes(1000),
    }


class TestBrokenImages:
    @pytest.mark.parametrize("kind", broken_files())
    def test_is_replaced_in_training_and_skipped_in_evaluation(self, tmp_path: Path, kind: str) -> None:
        write_folder(tmp_path, {"a": 2, "b": 2})
        path = tmp_path / "a" / "001.png"
        path.write_bytes(broken_files()[kind])
        for in_memory in (False, True):
            source = open_source(str(tmp_path), split="train", in_memory=in_memory)
            shown = together(basic(source).epoch(0, 8))
            assert sorted(shown.index.tolist()) == [0, 2, 2, 3]
            assert torch.equal(shown.y, shown.index // 2)
            ((name, reason),) = shown.failures
            assert name == str(path) and reason
            evaluated = together(EvalLoader(source, size=8, batch_size=3))
            assert evaluated.index.tolist() == [0, 2, 3] and evaluated.failures == shown.failures

    def test_files_that_vanished(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a": 3})
        source = open_source(str(tmp_path), split="train")
        (tmp_path / "a" / "002.png").unlink()
        shown = together(basic(source, batch_size=3).epoch(0, 8))
        assert sorted(shown.index.tolist()) == [0, 0, 1]  # the one after the last is the first
        assert [name for name, _ in shown.failures] == [str(tmp_path / "a" / "002.png")]
        assert "FileNotFoundError" in shown.failures[0][1]

    def test_several_in_a_row_are_all_reported(self) -> None:
        shown = together(basic(Pictures(8, broken=[2, 3, 4])).epoch(0, 8))
        assert sorted(shown.index.tolist()) == [0, 1, 5, 5, 5, 5, 6, 7]
        assert sorted(name for name, _ in shown.failures) == [f"picture {i}" for i in (2, 3, 3, 4, 4, 4)]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_nothing_but_broken_ones(self, workers: int) -> None:
        with pytest.raises(UserError, match="64 training images in a row cannot be decoded.*picture .*not an image"):
            list(basic(Pictures(4, broken=range(4)), num_workers=workers).epoch(0, 8))

    def test_a_batch_of_an_evaluation_may_become_empty(self) -> None:
        empty, full = EvalLoader(Pictures(4, broken=[0, 1]), size=8, batch_size=2)
        assert empty.x.shape == (0, 3, 8, 8) and empty.y.shape == empty.index.shape == (0,)
        assert empty.y.dtype == torch.int64 and len(empty.failures) == 2
        assert full.index.tolist() == [2, 3]

    def test_a_defect_of_the_transform_names_the_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def defect(*_: object) -> object:
            return lambda image: 1 / 0

        monkeypatch.setattr("data.loader.eval_transform", defect)
        with pytest.raises(RuntimeError, match="picture 0"):
            list(EvalLoader(Pictures(2), size=8, batch_size=2))

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
    def test_unusual_modes_are_no_failures(self, tmp_path: Path, mode: str) -> None:
        (tmp_path / "a").mkdir()
        image = Image.fromarray(np.full((9, 9), 999, np.uint16)) if mode == "I;16" else picture(1).convert(mode)
        image.save(tmp_path / "a" / ("1.jpg" if mode == "CMYK" else "1.png"))
        shown = together(EvalLoader(open_source(str(tmp_path), split="val"), size=8, batch_size=1))
        assert shown.x.shape == (1, 3, 8, 8) and not shown.failures


class TestEvaluation:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_each_image_once_over_all_ranks(self, workers: int) -> None:
        source = Pictures(11)
        parts = [
            together(EvalLoader(source, size=16, batch_size=2, rank=rank, world_size=3, num_workers=workers))
            for rank in range(3)
        ]
        assert [part.index.tolist() for part in parts] == [list(range(rank, 11, 3)) for rank in range(3)]
        transform = eval_transform(16)
        for part in parts:
            assert torch.equal(part.y, part.index)
            for x, i in zip(part.x, part.index.tolist(), strict=True):
                assert torch.equal(x, transform(picture(i)))

    def test_indices_batches_and_crop(self) -> None:
        loader = EvalLoader(Pictures(9), size=16, crop_pct=1.0, batch_size=2, world_size=1)
        batches = list(loader.batches([8, 1, 5]))
        assert [batch.index.tolist() for batch in batches] == [[8, 1], [5]]
        assert torch.equal(batches[0].x[1], eval_transform(16, 1.0)(picture(1)))
        assert same(together(batches), together(loader.batches([8, 1, 5])))  # again from the start
        second = EvalLoader(Pictures(9), size=8, batch_size=2, rank=1, world_size=2)
        assert together(second.batches(torch.tensor([8, 1, 5]))).index.tolist() == [1]


def write_shards(folder: Path, shards: int = 4, each: int = 6) -> Path:
    """WebDataset shards of pictures; each is its own class, so that a label tells which sample it is."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard * each, (shard + 1) * each):
                for ending, data in (("jpg", encoded(i, kind="JPEG")), ("cls", str(i).encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    names = [f"{shard}.tar" for shard in range(shards)]
    split = {"num_samples": shards * each, "filenames": names, "shard_lengths": [each] * shards}
    splits = {name: {"name": name, **split} for name in ("train", "validation")}
    (folder / "_info.json").write_text(json.dumps({"num_classes": shards * each, "splits": splits}))
    return folder


def write_parquet(folder: Path, shards: int = 4, each: int = 6) -> Path:
    """A data set as on the Hugging Face hub, with its card; each picture is its own class."""
    pa = pytest.importorskip("pyarrow", reason="writes parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="writes parquet")
    (folder / "data").mkdir(parents=True)
    for shard in range(shards):
        labels = list(range(shard * each, (shard + 1) * each))
        table = pa.table({"image": [{"bytes": encoded(i), "path": None} for i in labels], "label": labels})
        parquet.write_table(table, folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet")
    names = {str(i): f"class {i}" for i in range(shards * each)}
    features = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": {"class_label": {"names": names}}}]
    card = {
        "dataset_info": {"features": features, "splits": [{"name": "train", "num_examples": shards * each}]},
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")  # YAML, too
    return folder


class TestStreams:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[StreamSource]:
        pytest.importorskip("webdataset", reason="wds/ needs the package webdataset")
        yield open_source(f"wds/{write_shards(tmp_path / 'Shards')}", split="train")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_training_is_repeatable_and_epochs_differ(self, source: StreamSource, workers: int) -> None:
        loader = basic(source, num_workers=workers, augmentation=1, accum=2)
        assert not loader.repeatable_for_any_workers
        first = list(loader.epoch(0, 16))
        assert loader.steps_per_epoch == 6 and len(first) == 12
        assert sorted(together(first).y.tolist()) == list(range(24))
        assert set(together(first).index.tolist()) == {-1} and together(first).x.shape == (24, 3, 16, 16)
        second = together(loader.epoch(1, 16))
        assert second.y.tolist() != together(first).y.tolist()
        by_class = [shown.x[shown.y.argsort()] for shown in (together(first), second)]
        assert all(not torch.equal(*pair) for pair in zip(*by_class, strict=True))  # other crops
        again = basic(source, num_workers=workers, augmentation=1, accum=2)
        assert same(together(again.epoch(1, 16)), second)  # without epoch 0 before
        rest = list(again.epoch(0, 16, start_step=2))
        assert len(rest) == 8 and same(together(rest), together(first[4:]))

    def test_samples_of_a_shard_are_shuffled_differently_in_each_epoch(self, tmp_path: Path) -> None:
        pytest.importorskip("webdataset", reason="wds/ needs the package webdataset")
        source = open_source(f"wds/{write_shards(tmp_path / 'one', shards=1, each=24)}", split="train")
        loader = basic(source, num_workers=1)
        orders = {tuple(together(loader.epoch(epoch, 8)).y.tolist()) for epoch in range(3)}
        assert len(orders) == 3 and all(sorted(order) == list(range(24)) for order in orders)

    def test_ranks_share_the_shards(self, source: StreamSource) -> None:
        shown = [together(basic(source, rank=rank, world_size=2).epoch(0, 8)) for rank in (0, 1)]
        assert [len(part.y) for part in shown] == [12, 12]
        assert sorted(together(shown).y.tolist()) == list(range(24))

    @pytest.mark.parametrize("workers", [0, 2, 5])
    def test_evaluation_shows_each_sample_once_over_all_ranks(self, source: StreamSource, workers: int) -> None:
        parts = [
            together(EvalLoader(source, size=16, batch_size=4, rank=rank, world_size=2, num_workers=workers))
            for rank in (0, 1)
        ]
        assert sorted(together(parts).y.tolist()) == list(range(24))
        assert [len(part.y) for part in parts] == [12, 12]
        expected = eval_transform(16)(Image.open(io.BytesIO(encoded(parts[0].y[0].item(), kind="JPEG"))))
        assert torch.equal(parts[0].x[0], expected)

    def test_hugging_face_streams(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets", reason="hfids/ needs the package datasets")
        source = open_source(f"hfids/{write_parquet(tmp_path / 'Set')}", split="train", root=str(tmp_path))
        assert (len(source), source.shards, source.class_names) == (24, 4, [f"class {i}" for i in range(24)])
        shown = [together(basic(source, rank=rank, world_size=2, num_workers=2).epoch(0, 8)) for rank in (0, 1)]
        assert sorted(together(shown).y.tolist()) == list(range(24))
        evaluated = together(EvalLoader(source, size=16, batch_size=5))
        assert evaluated.y.tolist() == list(range(24))
        assert torch.equal(evaluated.x[7], eval_transform(16)(picture(7)))
        with pytest.raises(UserError, match="4 shards"):  # timm's reader would wait for ever
            basic(source, num_workers=5)

    def test_class_numbers_can_change(self, source: StreamSource) -> None:
        source.relabel(list(range(23, -1, -1)), [str(i) for i in range(24)])
        (batch,) = EvalLoader(source, size=8, batch_size=24)
        assert batch.y.tolist() == list(range(23, -1, -1))

    def test_errors(self, source: StreamSource, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^num_workers: .*4 shards.*6 loading processes \(3 × 2 processes\)"):
            basic(source, num_workers=3, world_size=2)
        with pytest.raises(ValueError, match="no indices"):
            EvalLoader(source, size=8, batch_size=2).batches([1])
        info = json.loads((tmp_path / "Shards" / "_info.json").read_text())
        (tmp_path / "Shards" / "_info.json").write_text(json.dumps({**info, "num_classes": 5}))
        few = open_source(f"wds/{tmp_path}/Shards", split="val")
        with pytest.raises(UserError, match="expected labels below 5, found 5 at position 5"):
            list(EvalLoader(few, size=8, batch_size=2))

    @pytest.mark.parametrize(("rank", "workers"), [(0, 0), (1, 0), (1, 2)])
    def test_an_evaluation_of_fewer_samples_than_announced(
        self, source: StreamSource, tmp_path: Path, rank: int, workers: int
    ) -> None:
        """A cut between two members is visible only in the number of samples."""
        shard = tmp_path / "Shards" / "1.tar"
        with tarfile.open(shard) as tar:
            end = tar.getmembers()[4].offset
        shard.write_bytes(shard.read_bytes()[:end])
        said = []
        options = {"size": 8, "batch_size": 4, "num_workers": workers, "on_warning": said.append}
        loader = EvalLoader(source, rank=rank, world_size=2, **options)
        for _ in range(2):
            assert sum(len(batch.y) for batch in loader) == 10
        assert [text.split(" announces ")[1][:32] for text in said] == (
            [] if rank else ["24 images, but 20 were read, and"] * 2
        )
        with pytest.raises(UserError, match="wds/.*: expected 10 images, got 8"):
            Collected(open_source(f"wds/{tmp_path}/Shards", split="val", split_name="{0..1}.tar|12"), 10)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_shard_that_is_missing_or_cut(self, source: StreamSource, tmp_path: Path, workers: int) -> None:
        shard = tmp_path / "Shards" / "1.tar"
        content = shard.read_bytes()
        for damage in (lambda: shard.write_bytes(content[:1300]), shard.unlink):
            damage()
            for batches in (
                basic(source, num_workers=workers).epoch(0, 8),
                EvalLoader(source, size=8, batch_size=4, num_workers=workers),
            ):
                with pytest.raises(UserError, match=r"^wds/[^\n]*: cannot be read \([^\n]*1.tar\)\.$"):
                    list(batches)

    def test_a_stream_without_images_ends_the_epoch_with_an_error(self, source: StreamSource, tmp_path: Path) -> None:
        for shard in (tmp_path / "Shards").glob("*.tar"):
            with tarfile.open(shard, "w"):
                pass
        with pytest.raises(RuntimeError, match="ended after 0 of 12 batches"):
            list(basic(source).epoch(0, 8))
