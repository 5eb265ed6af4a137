"""How fast images come, and what is said about it."""

from __future__ import annotations

import time

import pytest
import torch

import training.trainer
from data.loader import Batch
from tests.training.helpers import base_flags, run
from training.feeding import Feed

CPU = torch.device("cpu")


def slow(count, seconds, size=4):
    for _ in range(count):
        time.sleep(seconds)
        yield Batch(torch.zeros(size, 3, 2, 2), torch.zeros(size), torch.zeros(size), [])


@pytest.mark.parametrize("workers", [0, 2])
def test_feed_gives_all_batches_and_times_the_first(workers, monkeypatch):
    now, loaded = [0.0], []

    def batches(count, seconds):
        for batch in slow(count, 0):
            now[0] += seconds
            loaded.append(batch)
            yield batch

    monkeypatch.setattr("training.feeding.time.perf_counter", lambda: now[0])
    feed = Feed(num_workers=workers, device=CPU)
    watched = feed.watch(batches(9, 0.02))
    ahead = 3 * max(workers, 1)
    assert len(loaded) == ahead  # before anybody waits for a batch
    assert len(list(watched)) == 9 == len(loaded)
    assert feed.rate == pytest.approx(200)  # 4 images in 0.02 s
    assert feed.take() == pytest.approx(0.02 * (9 - ahead)) and feed.take() == 0  # without what was loaded ahead
    assert len(list(feed.watch(batches(3, 1)))) == 3 and feed.rate == pytest.approx(200)  # measured once


class Event:
    """Of a GPU's stream, at a time in milliseconds; None: the GPU has not come there yet."""

    def __init__(self, time):
        self.time = time

    def query(self):
        return self.time is not None

    def elapsed_time(self, other):
        return other.time - self.time


def test_a_gpu_waits_only_where_it_has_nothing_to_do():
    feed = Feed(num_workers=0, device=torch.device("cuda"))
    assert len(list(feed.watch(slow(5, 0.02)))) == 5 and feed.take() == 0  # the host's waiting does not count
    for before, after in ((1000, 1500), (2000, 2250), (3000, None)):
        feed.on_gap(Event(before), last := Event(after))
    assert feed.take() == 0.75 and feed.take() == 0
    last.time = 3125
    assert feed.take() == 0.125


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_batches_to_measure(count):
    feed = Feed(num_workers=2, device=CPU)
    assert len(list(feed.watch(slow(count, 0)))) == count and feed.rate is None
    assert feed.advice(images_per_second=1, waiting=1.0, processes=1) is None


def test_advice(monkeypatch):
    feed = Feed(num_workers=4, device=CPU)
    feed.rate = 400.0
    monkeypatch.setattr("training.feeding.os.sched_getaffinity", lambda _: range(32))
    assert feed.advice(images_per_second=390, waiting=0.04, processes=2) is None
    # Half of the time is training: 800 images/s, for which 8 of these workers are just enough.
    text = feed.advice(images_per_second=400, waiting=0.5, processes=2)
    assert "50%" in text and "data.num_workers=9 would suffice." in text and "cores" not in text
    assert "but there are 8 cores for each process" in feed.advice(images_per_second=400, waiting=0.5, processes=4)


def test_seen_in_the_log(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.trainer, "NOTICED_SECONDS", 0.0)
    monkeypatch.setattr("training.feeding.NOTICED_SHARE", 0.0)
    flags = base_flags(images, tmp_path) | {"training.batch_size": 2, "training.epochs": 2}
    for epoch in run(flags).epochs:
        assert epoch["loader_images_per_second"] > 0 and 0 < epoch["data_wait"] < 1
    said = capsys.readouterr()
    assert said.out.count("loader alone: ") == 1 and said.err.count("training waits for images") == 1


def test_an_epoch_too_short_to_measure(images, tmp_path, capsys):
    (epoch,) = run(base_flags(images, tmp_path) | {"training.batch_size": 24}).epochs
    assert "loader_images_per_second" not in epoch and "loader alone" not in capsys.readouterr().out
