"""Fixtures shared by the tests of several packages."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

# Waiting OpenMP threads spin, which slows down two busy test processes on one machine tenfold. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest

import common.provenance
from tests.training.helpers import write_images


@pytest.fixture(autouse=True)
def _curves(request, monkeypatch):
    """Draw curves only in tests marked `curves`: the plot of a small run takes longer than its training."""
    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr("training.run_folder.draw_curves", lambda log, picture: None)


@pytest.fixture(autouse=True, scope="session")
def _commit_found_once():
    """Find the commit once per test process; otherwise each run starts git twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.provenance, "commit", functools.cache(common.provenance.commit))
        yield


# Modules that test files after a failure of the machine or the disk.
SYNCED = {"test_checkpoint.py", "test_run_folder.py"}


@pytest.fixture(autouse=True, scope="module")
def _files_not_synced(request):
    """Disable fsync, which takes 5 % of a small run: the files of tests need not survive a failure of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in SYNCED:
            patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return a folder with train/ and val/: four classes, 24 and 8 images of 20 × 20 pixels; tests must not change it."""
    return write_images(tmp_path_factory.mktemp("images"))


@functools.cache
def _accelerator_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def pytest_pyfunc_call(pyfuncitem):
    """Run tests marked `accelerator` in one other process: their device cannot be removed, and would change other tests."""
    if pyfuncitem.get_closest_marker("accelerator") is None:
        return None
    from tests.helpers.accelerator import call_test

    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    try:
        _accelerator_process().submit(
            call_test, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments
        ).result()
    except BrokenProcessPool:
        _accelerator_process.cache_clear()  # the next test starts another one
        raise
    return True


def pytest_sessionfinish():
    if _accelerator_process.cache_info().currsize:
        _accelerator_process().shutdown()
