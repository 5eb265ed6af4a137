"""Reader of weights files: returns their tensors and plain values, and never executes anything from the file.

torch's own reader accepts tensors and plain values only. Many training states contain more: an `argparse.Namespace` (timm, MAE),
NumPy scalars, or the whole `nn.Module`. Their tensors are read normally. Every other object becomes a `Foreign`, which contains
the data of the object.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError
from common.files import damaged_record

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a torch.save file before PyTorch 1.6
_NUMBERS = re.compile(r"<(f[248]|[iu][248]|c8|c16)|\|([iu]1|b1)")  # codes of NumPy's types
_DEEPEST_MODULE = 20  # nesting depth of modules in a pickled network
SHOWN_NAMES = 5
# Names of a normaliser's mean and std, in a module or in the model itself: this project's, MadryLab's, and others.
NORMALIZERS = (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"), ("_mean", "_std"))
NORMALIZERS += (("image_mean", "image_std"), ("pixel_mean", "pixel_std"))
STATISTICS = {name for pair in NORMALIZERS for name in pair}


class Foreign(dict):
    """Placeholder for an object of another program: its entries, if it was a mapping, and its state."""

    state: Any = None

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> Foreign:
        return Foreign()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)

    def append(self, _: Any) -> None:
        """Ignore an item; pickles call this for lists and sets of other programs."""

    extend = add = append


class _ArrayType(Foreign):
    """A NumPy type by its code, such as <f4."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        super().__init__()
        self.code = f"{code}"

    def __setstate__(self, state: Any) -> None:
        self.code = f"{state[1]}{self.code}"


class Array(Foreign):
    """A NumPy array; `tensor` is None unless it has plain numbers in little-endian byte order."""

    tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, values = state
        if isinstance(kind, _ArrayType) and _NUMBERS.fullmatch(kind.code) and isinstance(values, bytes):
            array = np.ndarray(shape, kind.code, bytearray(values), order="F" if by_columns else "C")
            self.tensor = torch.from_numpy(array)


def listed(problems: list[str]) -> str:
    """Join the first few problems; append the number of further ones."""
    more = f" and {len(problems) - SHOWN_NAMES} more" if len(problems) > SHOWN_NAMES else ""
    return "; ".join(problems[:SHOWN_NAMES]) + more


def read_content(path: Path) -> tuple[Any, str]:
    """Read a file of `torch.save` or safetensors on the CPU; return its content and SHA-256.

    Raises:
        UserError: the file does not exist or has another format.
    """
    if not os.path.isfile(path):  # Path.is_file fails for names too long
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"expected a weights file, got {os.path.abspath(path)!r}, which {what}.")
    data = b""
    try:
        data = path.read_bytes()
        return _content(data, path.suffix), hashlib.sha256(data).hexdigest()
    except Exception as error:  # for a damaged file, readers raise nearly any exception: struct.error, IndexError, …
        raise UserError(
            f"{path} cannot be read as weights (torch.save, or safetensors): {_why_unreadable(data[:512], error)}."
        ) from error


def _content(data: bytes, suffix: str) -> Any:
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_archive(archive)
    elif suffix == ".safetensors" or data[8:9] == b"{":
        return safetensors.torch.load(data)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError) as error:  # AttributeError: some types in old torch files
        try:
            return _read_zip(data) if data.startswith(b"PK") else _read_legacy(data)
        except Exception:
            raise error from None


def _check_archive(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if not any(name.endswith("/data.pkl") for name in names):
        raise zipfile.BadZipFile(f"it is an archive of other files ({listed([repr(name) for name in names])})")
    if any(name.endswith("/constants.pkl") for name in names):
        raise zipfile.BadZipFile("it is a TorchScript program; expected the state_dict() of the model")
    if (name := damaged_record(archive)) is not None:
        problem = f"the checksum or header of {name!r} is wrong: it is damaged or was saved without checksums"
        raise zipfile.BadZipFile(problem)


def _why_unreadable(head: bytes, error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if not head:
        return "it is empty"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; the link was probably not the download link of the file"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` downloads the file"
    if isinstance(error, zipfile.BadZipFile):
        cut = str(error) == "File is not a zip file"
        return "its end is missing, so the copy or download is incomplete" if cut else str(error)
    if objects := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it contains Python objects or code ({objects[1]}), which are never loaded"
    if head.isascii() and head.decode("ascii").isprintable():
        return "it is text"
    return f"it is damaged or of another format ({type(error).__name__})"


# --- pickles that torch's own reader rejects --------------------------------------------------------------------------


class _Known:
    """A function that a pickle may call but not change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], _: Any = 0, __: Any = 0, bits: Any = 0
) -> Tensor:
    if bits:
        raise pickle.UnpicklingError("a tensor with a conjugate or negative bit")
    return torch.as_strided(storage, size, stride, offset)  # rejects views outside of the storage


def _tensor_of_type(storage: Tensor, *view: Any) -> Tensor:
    offset, size, stride, _, _, dtype, *bits = view
    return _tensor(storage.view(dtype), offset, size, stride, 0, 0, *bits)


def _of_another_type(function: Any, _: Any, arguments: tuple[Any, ...], __: Any) -> Any:
    return function(*arguments) if isinstance(function, _Known) else Foreign()


# All names that a pickle may use. None of them has effects outside of these functions.
_REBUILD, _PARAMETER = _Known(_tensor), _Known(lambda data, *_: data)
_STORAGES = {"Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Half": "float16"}
_STORAGES |= {"BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "Bool": "bool"}
_STORAGES |= {"ComplexFloat": "complex64", "ComplexDouble": "complex128"}
_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor"): _REBUILD,
    ("torch._utils", "_rebuild_tensor_v2"): _REBUILD,
    ("torch._utils", "_rebuild_tensor_v3"): _Known(_tensor_of_type),
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
    ("torch._tensor", "_rebuild_from_type_v2"): _Known(_of_another_type),
    ("torch", "Size"): tuple,
    ("numpy", "dtype"): _ArrayType,
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
    ("_codecs", "encode"): _Known(lambda text, *_: str.encode(text, "latin1")),  # encoding of bytes in older pickles
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", f"{name}Storage"): getattr(torch, dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}
_LARGEST_MEMO = 10_000_000  # entries; the unpickler allocates memory up to the highest index in a file


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, storage: Callable[[str, torch.dtype, int], np.ndarray]) -> None:
        """Read from `file`; `storage`: (key, dtype, number of elements) → bytes of a storage."""
        super().__init__(file, encoding="utf-8")
        self._file = file
        self._storage, self._storages = storage, {}

    def load(self) -> Any:
        place = self._file.tell()
        for opcode, argument, _ in pickletools.genops(self._file):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > _LARGEST_MEMO:
                raise pickle.UnpicklingError(f"memo entry {argument}")
            if opcode.name == "DUP":  # no pickler writes it, and a few suffice for a key that never finishes hashing
                raise pickle.UnpicklingError("a copy of an object")
        self._file.seek(place)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        return _NAMES.get((module, name), Foreign)

    def persistent_load(self, reference: Any) -> Any:
        if reference[0] == "module":  # a class with its source code
            return reference[1]
        kind, dtype, key, _, count, *view = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
            raise pickle.UnpicklingError(f"a reference to a {kind} of {dtype}")
        if key not in self._storages:
            # A pickle may call set_() on it (BUILD), which can enlarge storages of torch but not of NumPy.
            values = torch.from_numpy(self._storage(key, dtype, count))
            self._storages[key] = values.as_strided(values.shape, (1,)).view(dtype)
        if self._storages[key].dtype != dtype:
            raise pickle.UnpicklingError(f"storage {key} is both {self._storages[key].dtype} and {dtype}")
        return self._storages[key]


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("it was written on a machine with another byte order")

        def storage(key: str, *_: Any) -> np.ndarray:
            return np.frombuffer(bytearray(archive.read(f"{root}data/{key}")), np.uint8)

        return _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


def _read_legacy(data: bytes) -> Any:
    """Read consecutive pickles (magic number, version, machine facts, content, storage keys), then the storages."""
    file, storages = io.BytesIO(data), {}

    def storage(key: str, dtype: torch.dtype, count: int) -> np.ndarray:
        if not 0 <= count <= len(data):  # allocate no more memory than the file can fill
            raise ValueError("a tensor is larger than the file")
        storages[key] = count, np.zeros(count * dtype.itemsize, np.uint8)
        return storages[key][1]

    magic, _, _, content, keys = (_Unpickler(file, storage).load() for _ in range(5))
    if magic != _LEGACY_MAGIC or set(keys) != storages.keys():
        raise ValueError("not a file of torch.save")
    for key in keys:
        count, values = storages[key]
        if int.from_bytes(file.read(8), "little") != count or file.readinto(values) != values.nbytes:
            raise ValueError("a storage has another size than its tensors")
    return content


def modules_state(content: Foreign, above: tuple[Foreign, ...] = ()) -> dict[str, Any]:
    """Return the state dict of a pickled `nn.Module`, empty for any other object; `above`: the modules that contain it."""
    if (
        not isinstance(content.state, dict)
        or not isinstance(content.state.get("_modules"), dict)
        or any(content is holder for holder in above)
        or len(above) > _DEEPEST_MODULE
    ):
        return {}
    state, hidden = {}, content.state.get("_non_persistent_buffers_set", ())
    for pair in NORMALIZERS:  # a normaliser may have them as plain attributes
        values = [three_numbers(content.state.get(name)) for name in pair]
        state |= {} if any(value is None for value in values) else dict(zip(pair, values))
    for kind in ("_parameters", "_buffers"):
        values = content.state.get(kind)
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, Tensor) and (name not in hidden or name in STATISTICS):
                state[name] = value
    for name, module in content.state["_modules"].items():
        if isinstance(module, Foreign):
            inner = modules_state(module, (*above, content))
            state |= {f"{name}.{key}": value for key, value in inner.items()}
    return state


def three_numbers(value: Any) -> Tensor | None:
    """Return a list, array or tensor of three numbers as a tensor; None for anything else."""
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) and 0 <= v <= 255 for v in value):
        value = torch.tensor(value, dtype=torch.float32)
    value = value.tensor if isinstance(value, Array) else value
    return value if isinstance(value, Tensor) and value.numel() == 3 else None
