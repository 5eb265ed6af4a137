"""A fake accelerator: the device "fake", whose tensors hold CPU tensors, with a GPU's rules about the host.

It computes the CPU's numbers, with the CPU's random numbers, but refuses what a GPU refuses, or what makes the host wait for a GPU.
A registered device changes PyTorch for the whole process (`torch.accelerator`, pinned memory), so `tests/conftest.py` runs tests
marked `accelerator` in a process of their own. Streams and events do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.utils import _foreach_utils, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("privateuseone:0")  # called "fake" after `register`
SETUP = "_setup_privateuseone_for_python_backend"
MARKS = [
    pytest.mark.accelerator,
    pytest.mark.skipif(
        not hasattr(backend_registration, SETUP), reason="PyTorch registers devices in Python since 2.10"
    ),
]
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
# The host needs the result, or the result's shape, before it can go on.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim")
# Operators of this project's networks that autocast runs in half precision. Unlike PyTorch's own, it keeps no cast weights, and
# leaves all others, such as norms, in the type of their input, as on a CPU.
LOWERED = ("conv2d", "linear", "matmul", "bmm", "baddbmm", "addmm", "scaled_dot_product_attention")


class Refused(BaseException):
    """A GPU refuses this, or the host waits for it. Not an Exception, because the project's code handles those."""


class Held(Tensor):
    """A tensor of the device; `held` is the CPU tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise Refused(f"{func}: a tensor of the device outside `Accelerator`")


class Accelerator(TorchDispatchMode):
    """Runs operators on the held tensors; raises `Refused` for tensors on different devices, and where the host waits.

    For an operator of a backward pass it raises after that pass, because an error within it would end the process.
    `on_operator` is called with each operator that the device runs, its arguments and its result.
    """

    def __init__(self, on_operator: Callable[[Any, tuple, Any], None] = lambda *_: None) -> None:
        super().__init__()
        self.on_operator = on_operator
        self._allowed: tuple[str, ...] = ()
        self._late: Refused | None = None
        self._pinned: dict[int, Tensor] = {}

    def __enter__(self) -> Accelerator:
        Accelerator.entered = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self._raise_late()

    def _raise_late(self) -> None:
        late, self._late = self._late, None
        if late is not None:
            raise late

    @contextmanager
    def allowed(self, *operators: str) -> Iterator[None]:
        """Let the host wait in these operators."""
        before, self._allowed = self._allowed, self._allowed + operators
        try:
            yield
        finally:
            self._allowed = before

    def allowing(self, function: Callable, *operators: str) -> Callable:
        """Return a function that calls `function` with `allowed(*operators)`."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.allowed(*operators):
                return function(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        if name == "record_stream":
            return None
        if name == "is_pinned":
            return _place(args[0]) in self._pinned
        if name == "_pin_memory":
            copy = args[0].clone()
            self._pinned[_place(copy)] = copy  # kept, so that no other tensor gets its memory
            return copy
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        wrappers = {id(value.held): value for value in given if isinstance(value, Held)}
        there = bool(wrappers) if kwargs.get("device") is None else torch.device(kwargs["device"]).type == DEVICE.type
        there = isinstance(args[0], Held) if name == "copy_" else there
        if there or wrappers:
            here = [value for value in given if not isinstance(value, Held)]
            refused = self._refused(func, name, args, kwargs, here, there)
            self._late = self._late or refused
            if torch._C._current_autograd_node() is None:
                self._raise_late()
        if there and "device" in kwargs:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map_only(Held, lambda value: value.held, (args, kwargs))
        result = func(*args, **kwargs)
        if there:
            self.on_operator(func, args, result)
            result = tree_map_only(
                Tensor, lambda held: wrappers[id(held)] if id(held) in wrappers else Held(held), result
            )
        return result

    def _refused(
        self, func: Any, name: str, args: tuple, kwargs: dict, here: list[Tensor], there: bool
    ) -> Refused | None:
        waits = name in READS
        if name in COPIES:  # a copy to the device does not wait if it is asked not to, and the memory is pinned
            non_blocking = kwargs.get("non_blocking") or name == "copy_" and len(args) > 2 and args[2]
            waits = not there or any(not non_blocking or _place(value) not in self._pinned for value in here)
            here = []
        elif name in INDEXING and there:  # a mask's number of ones is read; places on the CPU are copied
            places = [place for place in args[1] if place is not None]
            waits = any(place.dtype == torch.bool or not isinstance(place, Held) for place in places)
            here = [value for value in here if all(value is not place for place in places)]
        if any(value.dim() for value in here):
            return Refused(f"{func}: a tensor on the CPU among tensors of the device")
        return Refused(f"{func}: the host waits for the device") if waits and name not in self._allowed else None


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Event:
    """In place of torch.Event, which cannot tell times for a device of Python."""

    def __init__(self, *, enable_timing: bool) -> None:
        self.query, self.elapsed_time = lambda: True, lambda other: 1.0


class Stream(torch.Stream):
    def record_event(self, event: Event) -> Event:
        return event


@cache
def register() -> None:
    """Register the device in this process, with autocast for `LOWERED`. It cannot be removed."""
    global DEVICE, _library
    module = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_name=lambda device=None: "fake",
        max_memory_allocated=lambda device=None: 3 * 2**30,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        Event=Event,
        Stream=Stream,
        current_stream=Stream,
        stream=lambda stream: nullcontext(),
    )
    getattr(backend_registration, SETUP)("fake", module)
    DEVICE = torch.device("fake:0")
    key = DispatchKey.AutocastPrivateUse1
    _library = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL", key.name)
    _library[1].fallback(torch.library.fallthrough_kernel)

    def empty_strided(size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **options: Any) -> Held:
        return Held(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, target: Held, non_blocking: bool = False) -> Held:
        if "copy_" not in Accelerator.entered._allowed:
            raise Refused("aten._copy_from: the host waits for the device")
        target.held.copy_(source)
        return target

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        more.pop("enable_gqa", None)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, **more)[0]

    # Fused attention and clipping are for PyTorch's own devices and types of tensors.
    _library[0].impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    _foreach_utils._foreach_supported_types.append(Held)
    # Python's lists, as places or values, are moved to the device past every mode.
    _library[0].impl("empty_strided", empty_strided, "PrivateUse1")
    _library[0].impl("_copy_from", copy_from, "PrivateUse1")

    def lowered(operator: Any) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype("fake")
            with _ExcludeDispatchKeyGuard(DispatchKeySet(key)):
                args = tree_map_only(Tensor, lambda x: x.to(dtype) if x.dtype == torch.float32 else x, args)
                return operator(*args, **kwargs)

        return run

    for name in LOWERED:
        operator = getattr(torch.ops.aten, name)
        _library[0].impl(name, lowered(operator), key.name)


def call_test(module: str, name: str, arguments: dict[str, Any]) -> None:
    """Run a test function in this process, with the device."""
    register()
    getattr(import_module(module), name)(**arguments)
