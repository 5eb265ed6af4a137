"""Rendezvous and collectives of a run's processes. The only user of torch.distributed.

Several processes are started by `training.launch`, on one machine, or by a launcher such as torchrun. NCCL joins GPUs, gloo CPUs.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from common.errors import UserError, describe
from common.gpus import usable_gpus

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
ANSWER_SECONDS = 5.0  # for the other processes to say why they failed
STORE_POLL_SECONDS = 0.2


class LostProcess(Exception):
    """Another process of the run failed, died, hangs or cannot be reached; the message is a sentence that says which and why.

    `failed`: it failed with an error of its own, which a new start will most likely meet again.
    """

    def __init__(self, sentence: str, *, failed: bool = False) -> None:
        super().__init__(sentence)
        self.failed = failed


@dataclass(frozen=True)
class Processes:
    """This process among all of the run. `store` holds small values that all of them read and write."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, repr=False)

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> Processes:
        """The only process, on `device` or else the first GPU, or the CPU where there is none."""
        return cls(rank=0, world_size=1, device=_device(0) if device is None else torch.device(device))

    @property
    def on_this_machine(self) -> int:
        """Number of the run's processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)) if under_torchrun() else self.world_size

    @property
    def from_launcher(self) -> bool:
        """Whether a launcher such as torchrun started this run's processes."""
        return under_torchrun()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def rendezvous(self) -> str | None:
        """Where the processes met, `address:port`; None where there is only this one."""
        store = self._bare_store()
        return f"{store.host}:{store.port}" if isinstance(store, dist.TCPStore) else None

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce `value` in place; every process receives the sum."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every process, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's `value`, on every process.

        Args:
            value: dicts, lists and tuples, nested, of CPU tensors and picklable values; of the first process alone, the
                others may pass anything.

        Returns:
            On the first process `value` itself, elsewhere an equal one; tensors keep dtype, shape and every bit.
        """
        if self.world_size == 1:
            return value
        plan = [tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), value)] if self.is_first else [None]
        dist.broadcast_object_list(plan, src=0)
        return tree_map_only(Tensor, self._broadcast, value if self.is_first else plan[0])

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """As bytes, for no backend knows every dtype; one tensor at a time, so that the device holds no second copy of all."""
        raw = tensor.contiguous() if self.is_first else torch.empty(tensor.shape, dtype=tensor.dtype)
        staged = raw.reshape(-1).view(torch.uint8).to(self.device)
        if staged.numel():
            dist.broadcast(staged, src=0)
        return tensor if self.is_first else staged.cpu().view(tensor.dtype).reshape(tensor.shape)

    def on_first(self, action: Callable[[], T]) -> T | None:
        """The result of `action` on the first process, None on the others.

        Raises:
            UserError: that process met one; on all of them.
        """
        result, problems = _attempt(action) if self.is_first else (None, ())
        if problems := self.gather(problems)[0]:
            raise UserError(*problems)
        return result

    def once_here(self, name: str, action: Callable[[], str]) -> str:
        """`action` on the first process of this machine; its result on all processes of it, which wait as long as it takes.

        Raises:
            UserError: that process met one; on all of them.
        """
        if self.on_this_machine == 1:
            return action()
        place = local_rank() if under_torchrun() else self.rank
        key = f"once/{name}/{self.rank - place}"
        if place == 0:
            self.store.set(key, json.dumps(_attempt(action)))
        while not self.store.check([key]):
            time.sleep(STORE_POLL_SECONDS)
        result, problems = json.loads(self.store.get(key))
        if problems:
            raise UserError(*problems)
        return result

    def lost(self, error: Exception) -> LostProcess | None:
        """What the failure `error` of this process says of another one; None where the failure is this process's own.

        The other processes learn of a failure of this process's own here. Takes up to twice `ANSWER_SECONDS`.
        """
        if self.world_size == 1:
            return None
        if isinstance(error, LostProcess):
            return error
        own = not is_of_the_engine(error)
        text = f"process {self.rank} of {self.world_size} on {socket.gethostname()} failed: {describe(error)}"
        try:
            store = self._connect_again()
            store.set(f"failed/{self.rank}", json.dumps([own, text]))
            return None if own else self._find_lost(store, describe(error))
        except RuntimeError:  # the store's errors
            unreachable = f"the first process, or its machine, cannot be reached ({describe(error)})."
            return None if own else LostProcess(unreachable)

    def _find_lost(self, store: dist.Store, error: str) -> LostProcess:
        silent = [rank for rank in range(self.world_size) if rank != self.rank]
        end = time.monotonic() + ANSWER_SECONDS
        while silent and time.monotonic() < end:
            for rank in list(silent):
                if store.check([f"failed/{rank}"]):
                    own, text = json.loads(store.get(f"failed/{rank}"))
                    if own:
                        return LostProcess(f"{text}.", failed=True)
                    silent.remove(rank)
            time.sleep(STORE_POLL_SECONDS)
        if not silent:
            return LostProcess(f"the connection between the {self.world_size} processes broke ({error}).")
        ranks = ", ".join(map(str, silent))
        return LostProcess(
            f"process {ranks} of {self.world_size} does not answer: it died, hangs or is cut off ({error})."
        )

    def _connect_again(self) -> dist.Store:
        """The store through a connection of its own, as the first one may be what hangs."""
        shared = self._bare_store()
        if isinstance(shared, dist.TCPStore):
            shared = connect_store(shared.host, shared.port, timedelta(seconds=ANSWER_SECONDS))
        # torchrun keeps one store for all its restarts.
        return dist.PrefixStore(f"lost/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", shared)

    def _bare_store(self) -> dist.Store:
        store = self.store
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        return store

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes; the model itself where there is only one."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # newer versions of PyTorch call the argument by another name
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=devices,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # they are the same everywhere: constants, and statistics that training averages
            )


def _attempt(action: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """The result of `action`, and the problems of the `UserError` that it met instead."""
    try:
        return action(), ()
    except UserError as error:
        return None, error.args


def is_of_the_engine(error: Exception) -> bool:
    """Whether a collective failed, which is another process's fault."""
    # A gloo operation that times out tells those that wait beside it so, and these do not name gloo.
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Application timeout")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def torchrun_can_wait() -> bool:
    """Whether this torchrun lets one say how long it waits after SIGTERM."""
    from torch.distributed.launcher.api import LaunchConfig

    return "shutdown_timeout" in LaunchConfig.__annotations__


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted_after_failure() -> bool:
    """Whether torchrun starts processes again that end with another status than 0 (its --max-restarts)."""
    return under_torchrun() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def local_rank() -> int:
    """This process's number among those that the launcher started on this machine; 0 where none did."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"] if under_torchrun() else 0))


def check_processes(world_size: int) -> int:
    """Number of processes of the run; refuses more than GPUs on a machine with GPUs, and a number other than torchrun's."""
    total = world_size
    if under_torchrun():
        started = int(os.environ["WORLD_SIZE"])
        if world_size not in (1, started):
            raise UserError(f"{world_size} was asked for, but the launcher started {started} processes; leave it out.")
        total, world_size = started, int(os.environ.get("LOCAL_WORLD_SIZE", started))
    gpus = usable_gpus()
    if gpus and world_size > gpus:
        raise UserError(f"{world_size} processes need as many GPUs on this machine, {gpus} visible.")
    return total


def check_rendezvous(address: str, port: int) -> None:
    """Refuse an address the store cannot listen on, which would otherwise show as a time-out of all."""
    with _listener(address, port):
        pass


@contextmanager
def _listener(address: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to this address alone; closed afterwards, unless it was detached."""
    try:
        family, _, _, _, numeric = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(numeric)
            yield listener
    except OSError as error:
        raise UserError(
            f"the first process cannot listen on {address}:{port} ({error.strerror or error}); "
            "expected an address of this machine and a free port."
        ) from error


def open_store(address: str, port: int, timeout: timedelta) -> dist.Store:
    """The store of processes that this one starts; it is there as long as this one. Listens on this address alone.

    Raises:
        UserError: it cannot.
    """
    with _listener(address, port) as listener:
        host, port = listener.getsockname()[:2]
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )


def connect_store(host: str, port: int, timeout: timedelta) -> dist.Store:
    """The store that another process has opened there."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """The store without what an earlier attempt left in it, such as the addresses of processes that have ended.

    torchrun may keep one store for all its restarts. It counts them on each node, so with several nodes the counts may differ.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def joined(
    *,
    timeout: timedelta = TIMEOUT,
    device: torch.device | None = None,
    store: dist.Store | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Processes]:
    """This process among the others, who meet at `store`, or else where torchrun says; alone where there is neither.

    Args:
        timeout: longest wait for the other processes, at the start and in each collective.
        device: of this process; by default a GPU of its own, where there is one.
        store, rank, world_size: of a process that no launcher started.

    Raises:
        LostProcess: a collective failed.
    """
    if store is None:
        if not under_torchrun():
            yield Processes.alone(device)
            return
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = _of_this_attempt(store)
    device = device or _device(local_rank() if under_torchrun() else rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = {"device_id": device} if backend == "nccl" else {}  # else barriers guess it, with a warning
    processes = Processes(rank=rank, world_size=world_size, device=device, store=store)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **bound)
        yield processes
    except SystemExit:  # all processes leave alike
        dist.destroy_process_group()
        raise
    except BaseException as error:
        lost = processes.lost(error) if isinstance(error, Exception) else None
        with suppress(Exception):  # after a failure this may fail as well, which must not take its place
            if backend == "nccl":
                # To destroy its communicators NCCL waits for all processes, and the others do not know of the failure.
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()
        if lost is not None:
            raise lost from error
        raise
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
