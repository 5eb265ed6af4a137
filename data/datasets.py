"""Where images come from: folder, tar, digits, torchvision, Hugging Face, and timm's streaming readers.

`open_source` turns a flag's value into one of two things:

- a `Source`: random access; `read(i)` gives image i, encoded wherever possible, and its label;
- a `StreamSource` (`wds/`, `tfds/`, `hfids/`): samples in the order of timm's reader.

To add a source, write a function from `_Request` to one of them and name it in `_OPENERS`.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import posixpath
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from common.errors import UserError

# What Pillow raises on broken files; UnidentifiedImageError is an OSError.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation")}
_SPLIT_NAMES = {"train": "train", "val": "validation"}
_STREAM_PACKAGES = {  # what to import, what to install
    "wds": ("webdataset", "webdataset"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
}
_LOADING_THREADS = 16
_CHUNK = 256  # images that a thread loads at a time

T = TypeVar("T")


def decode(image: bytes | Image.Image) -> Image.Image:
    """RGB image from an encoded or an opened one of any mode and size. Raises one of `DECODE_ERRORS`."""
    if isinstance(image, bytes):
        if not image:
            raise ValueError("the file is empty or cannot be read")
        try:
            image = Image.open(io.BytesIO(image))
        except UnidentifiedImageError:  # its own message shows a memory address
            raise ValueError("not an image of a format that Pillow knows") from None
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it at 255, that is, turn it white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about palettes with an alpha table otherwise
    return image.convert("RGB")


class Source:
    """Images with random access. A subclass says where image i is; all labels are known from the start.

    `labels` is int64 (N,). `class_names` is None where the data set only numbers its classes; `num_classes` is then
    the largest label + 1.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, class_names: list[str] | None) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names
        self.num_classes = int(self.labels.max()) + 1 if class_names is None else len(class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> tuple[bytes | Image.Image, int]:
        """Image i, as its file's bytes wherever there are any, and its label in [0, num_classes)."""
        return self.image(i), int(self.labels[i])

    def image(self, i: int) -> bytes | Image.Image:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Image i's path, or what else tells a person which image it is."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """Image i's name without the place where the data set lies on this machine."""
        return self.name(i)

    def size(self, i: int) -> int:
        """Bytes of image i in memory."""
        return len(_encoded(self, i))

    def relabel(self, numbers: Sequence[int], class_names: list[str]) -> None:
        """Class c becomes `numbers[c]`, its place among `class_names`."""
        self.labels = np.asarray(numbers, dtype=np.int64)[self.labels]
        self.class_names, self.num_classes = class_names, len(class_names)


class StreamSource:
    """Samples that can only be read in order, through a reader of timm (`wds/`, `tfds/`, `hfids/`).

    `shards` is the number of files to deal to ranks and workers, or None where any number of them can share. These
    readers decode themselves: of broken images wds/ warns and skips them, the others stop.
    """

    def __init__(
        self,
        spec: str,
        make_reader: Callable[..., Any],
        length: int,
        shards: int | None,
        class_names: list[str] | None,
        num_classes: int,
    ) -> None:
        self.spec, self._make_reader, self._length, self.shards = spec, make_reader, length, shards
        self.class_names, self.num_classes = class_names, num_classes
        self._numbers: Sequence[int] = range(num_classes)

    def __len__(self) -> int:
        return self._length

    def relabel(self, numbers: Sequence[int], class_names: list[str]) -> None:
        """Class c becomes `numbers[c]`, its place among `class_names`."""
        self._numbers, self.class_names, self.num_classes = numbers, class_names, len(class_names)

    def samples(
        self, *, training: bool, batch_size: int, seed: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[tuple[Image.Image, int]]:
        """This loader worker's (RGB image, label): shuffled and wrapping around if `training`, else each once."""
        reader = self._make_reader(is_training=training, batch_size=batch_size, seed=seed)
        # timm would take these from torch.distributed, if that runs; here they are arguments.
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        reader.set_loader_cfg(num_workers=max(num_workers, 1))
        for position, (image, label) in enumerate(reader):
            if not 0 <= label < len(self._numbers):
                raise UserError(
                    f"{self.spec}: expected labels below {len(self._numbers)}, found {label} at position {position}."
                )
            yield image, self._numbers[label]


class Collected(Source):
    """The first `count` samples of a stream, read once and kept in memory, encoded without loss."""

    def __init__(self, stream: StreamSource, count: int) -> None:
        reader = {"training": False, "batch_size": 1, "seed": 0, "rank": 0, "world_size": 1, "num_workers": 1}
        samples = list(islice(stream.samples(**reader), count))
        if not samples:
            raise UserError(f"{stream.spec}: expected at least one image, found none.")
        super().__init__([label for _, label in samples], stream.class_names)
        self.num_classes, self._spec = stream.num_classes, stream.spec
        self._images = [_png(image) for image, _ in samples]

    def image(self, i: int) -> bytes:
        return self._images[i]

    def name(self, i: int) -> str:
        return f"{self._spec}[{i}]"

    def key(self, i: int) -> str:
        return f"{self._spec.split('/')[0]}[{i}]"  # what follows may be a folder


@dataclass(frozen=True)
class _Request:
    """What `open_source` was asked for; `split_name` is the split's name in data sets that name their splits."""

    spec: str
    split: str
    flag: str
    root: str
    split_name: str

    def error(self, text: str) -> UserError:
        return UserError(f"{self.flag}: {text}")

    def require(self, module: str, package: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise self.error(f"{self.spec} needs a package: pip install {package} ({error}).") from error


def open_source(
    spec: str,
    *,
    split: str,
    flag: str,
    root: str = "",
    split_name: str = "",
    class_names: list[str] | None = None,
    in_memory: bool = False,
    copies: int = 1,
    progress: bool = False,
) -> Source | StreamSource:
    """Open the images that `spec` names. Classes are numbered by sorted name, or as the data set numbers them.

    Args:
        spec: a folder of class folders, or one that holds such folders as `train/` and `val/` (or `validation/`);
            a `.tar` of class folders; `digits`; `hfds/NAME`, `hfids/NAME`, `tfds/NAME`, `torch/NAME`, `wds/FOLDER`.
            A folder that is called like one of these is `./digits`. Links are followed, in a .tar those to files in it;
            a link that leads back to a folder it lies in is left out.
        split: "train" or "val".
        flag: the flag `spec` came from, for error messages.
        root: where hfds, hfids, tfds and torch keep their files.
        split_name: the split's name in those data sets and in wds; by default train or validation.
        class_names: those of the training set; labels become its numbers, matched by class name.
        in_memory: keep the encoded images in one tensor in shared memory.
        copies: processes of this machine that do so, each with a copy of its own.
        progress: show a bar while loading into memory.

    Raises:
        UserError: there is no such thing, or it is not of that shape; a package is missing; a class is unknown to
            the training set; not enough memory.
    """
    request = _Request(spec, split, flag, root, split_name or _SPLIT_NAMES[split])
    source = _opener(request)(request)
    if class_names is not None and source.class_names is not None and class_names != source.class_names:
        unknown = sorted(set(source.class_names) - set(class_names))
        if unknown:
            raise request.error(
                f"{spec} has classes that the training set does not have: {_some(unknown)}. Expected names among its "
                f"{len(class_names)} classes: {_some(class_names)}."
            )
        source.relabel([class_names.index(name) for name in source.class_names], class_names)
    if not in_memory:
        return source
    if isinstance(source, StreamSource):
        raise request.error(f"{spec} is a stream, which cannot be kept in memory. Use data.in_memory=0 or a folder.")
    return _load_into_memory(source, request, copies=copies, progress=progress)


class _Folder(Source):
    def __init__(self, root: Path, samples: list[tuple[str, int]], class_names: list[str]) -> None:
        """`samples`: paths below `root`, and labels."""
        super().__init__([label for _, label in samples], class_names)
        self._root = str(root)
        # One array: Python strings would be copied into each worker, page by page, by their reference counts.
        self._paths = np.array([os.fsencode(path) for path, _ in samples])

    def image(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()

    def name(self, i: int) -> str:
        return os.path.join(self._root, self.key(i))

    def key(self, i: int) -> str:
        return os.fsdecode(self._paths[i])

    def size(self, i: int) -> int:
        return os.stat(self.name(i)).st_size


def _open_path(request: _Request) -> Source:
    path = Path(request.spec).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path, request)
        if path.is_file() and path.suffix == ".tar":
            return _open_tar(path, request)
        found = "a file" if path.is_file() else "nothing"
    except OSError as error:
        raise request.error(f"cannot read {error.filename or path} ({error.strerror or error}).") from error
    kinds = "a folder of class folders, a .tar of them, digits, or hfds/… hfids/… tfds/… torch/… wds/…"
    raise request.error(f"expected {kinds}, found {found} at {path}.")


def _open_folder(path: Path, request: _Request) -> Source:
    root = _split_folder(path, request)
    names = _folders(root)
    if not names:
        raise request.error(f"expected a sub-folder for each class in {root}, found none, {_loose_images(root)}")
    lost = sorted(
        e.name for e in os.scandir(root) if e.name[0] != "." and e.is_symlink() and not os.path.exists(e.path)
    )
    if lost:  # each may be a class
        raise request.error(f"expected class folders in {root}, found links that lead nowhere: {_some(lost)}.")
    samples = [(path, number) for number, name in enumerate(names) for path in _images_below(str(root), name)]
    empty = sorted(set(names) - {names[label] for _, label in samples})
    # A class without images is a mistake in the training set; a validation set may lack some.
    if empty and (request.split == "train" or not samples):
        endings = " ".join(IMG_EXTENSIONS)
        raise request.error(
            f"expected images ({endings}) in the class folders of {root}, found none in {_some(empty)}."
        )
    return _Folder(root, samples, names)


def _loose_images(folder: Path) -> str:
    """What a folder without class folders holds, and what to do about it."""
    loose = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(folder))
    return _unsorted_imagenet(folder) or f"and {loose} loose images."


def _unsorted_imagenet(folder: Path) -> str:
    """What to do with ImageNet's validation set as it comes out of its archive; empty where the folder holds no such images."""
    loose = sum(entry.name.startswith("ILSVRC2012_val_") for entry in os.scandir(folder) if entry.is_file())
    if not loose:
        return ""
    return (
        f"but {loose} loose images of ImageNet's validation set. To sort them into folders by class, put "
        "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into a folder and run, in it: "
        """python -c "import torchvision; torchvision.datasets.ImageNet('.', split='val')"; then give that folder."""
    )


def _split_folder(path: Path, request: _Request) -> Path:
    # A class may be called "train", too: only a folder of folders is a split.
    splits = {
        split: [path / name for name in names if (path / name).is_dir() and _folders(path / name)]
        for split, names in _SPLIT_FOLDERS.items()
    }
    if splits[request.split]:
        return splits[request.split][0]
    for name in _SPLIT_FOLDERS[request.split]:
        if (path / name).is_dir() and (hint := _unsorted_imagenet(path / name)):
            raise request.error(f"expected a sub-folder for each class in {path / name}, found none, {hint}")
    if any(splits.values()):
        expected = " or ".join(_SPLIT_FOLDERS[request.split])
        raise request.error(f"expected {expected} with class folders in {path}, found {_some(_folders(path))}.")
    return path


def _folders(path: Path) -> list[str]:
    here = [os.path.realpath(path)]
    entries = [entry for entry in os.scandir(path) if entry.name[0] != "." and _is_folder(entry)]
    return sorted(e.name for e in entries if not (e.is_symlink() and _leads_back(os.path.realpath(e.path), here)))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # links in a circle lead nowhere
            return False
        raise


def _leads_back(folder: str, above: list[str]) -> bool:
    """Whether `folder` is one of the folders `above`, or holds one of them; all are real paths."""
    return any(os.path.join(other, "").startswith(os.path.join(folder, "")) for other in above)


def _images_below(root: str, folder: str) -> list[str]:
    """Paths below `root` of the images in `root`/`folder` and deeper, by their folders, then by their names."""
    above = [os.path.realpath(root), os.path.realpath(os.path.join(root, folder))]
    return [
        f"{below}/{name}"
        for below, names in sorted(_walk(root, folder, above))
        for name in sorted(names)
        if name.lower().endswith(IMG_EXTENSIONS)
    ]


def _walk(root: str, folder: str, above: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for `root`/`folder` and all below. `above`: real paths on the way to it, and its own."""
    names, folders = [], []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if not _is_folder(entry):
                names.append(entry.name)
                continue
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if not _leads_back(real, above):
                folders.append((f"{folder}/{entry.name}", real))
    yield folder, names
    for below, real in folders:
        yield from _walk(root, below, [*above, real])


class _Tar(Source):
    def __init__(self, path: Path, members: list[tuple[str, int, int]], classes: list[str]) -> None:
        class_names = sorted(set(classes))
        numbers = {name: number for number, name in enumerate(class_names)}
        super().__init__([numbers[name] for name in classes], class_names)
        self._path = str(path)
        self._names = np.array([os.fsencode(name) for name, _, _ in members])
        self._places = np.array([(offset, size) for _, offset, size in members], dtype=np.int64)

    def image(self, i: int) -> bytes:
        offset, size = self._places[i].tolist()
        with open(self._path, "rb") as file:  # threads and forked workers would share an open file's position
            file.seek(offset)
            return file.read(size)

    def name(self, i: int) -> str:
        return f"{self._path}:{self.key(i)}"

    def key(self, i: int) -> str:
        return os.fsdecode(self._names[i])

    def size(self, i: int) -> int:
        return int(self._places[i, 1])


def _open_tar(path: Path, request: _Request) -> Source:
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(tar)
    except tarfile.TarError as error:
        raise request.error(f"{path} is not a complete, uncompressed tar file ({error}).") from error
    images = [file for file in _tar_files(members, request) if file[0].lower().endswith(IMG_EXTENSIONS)]
    folders = [PurePosixPath(name).parent.parts for name, _, _ in images]
    # A tar made from outside a data set's folder has that folder's name in front of everything.
    splits = {name for names in _SPLIT_FOLDERS.values() for name in names}
    while folders and all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        if folders[0][0] in splits:
            break
        folders = [parts[1:] for parts in folders]
    tops = {parts[0] for parts in folders if len(parts) > 1}
    split = next((name for name in _SPLIT_FOLDERS[request.split] if name in tops), None)
    if split is None and tops & splits:
        expected = " or ".join(_SPLIT_FOLDERS[request.split])
        raise request.error(f"expected {expected} with class folders in {path}, found {_some(sorted(tops))}.")
    kept = [i for i, parts in enumerate(folders) if (parts if split is None else parts[:1] == (split,) and parts[1:])]
    if not kept:
        raise request.error(f"expected class folders with images in {path}, found {len(images)} loose images.")
    depth = 0 if split is None else 1  # deeper folders belong to the class, as in a folder of class folders
    return _Tar(path, [images[i] for i in kept], [folders[i][depth] for i in kept])


def open_listed(spec: str, keys: Sequence[str], class_names: list[str], *, flag: str) -> Source:
    """The images `keys` (`<class>/<file>`) of a validation folder, in their order; labels are places among `class_names`.

    Args:
        spec: folder of class folders, or one that holds such a folder as `val/` or `validation/`.
        keys: paths below it.
        class_names: the class folders.
        flag: the flag `spec` came from, for error messages.

    Raises:
        UserError: no such folder, or class folders or files of the list are missing from it.
    """
    request = _Request(spec, "val", flag, "", "")
    path = Path(spec).expanduser()
    try:
        if not path.is_dir():
            raise request.error(
                f"expected a folder of class folders, found {'a file' if path.is_file() else 'nothing'} at {path}."
            )
        root = _split_folder(path, request)
        present = set(_folders(root))
        if not present:
            raise request.error(f"expected a sub-folder for each class in {root}, found none, {_loose_images(root)}")
        absent = sorted({key.split("/")[0] for key in keys} - present)
        if absent:
            raise request.error(
                f"expected the folders of all {len(class_names)} classes in {root}, missing: {_some(absent)}."
            )
        with ThreadPoolExecutor(_LOADING_THREADS) as threads:
            exist = list(threads.map(lambda key: (root / key).is_file(), keys))
    except OSError as error:
        raise request.error(f"cannot read {path} ({error.strerror or error}).") from error
    missing = [key for key, exists in zip(keys, exist) if not exists]
    if missing:
        raise request.error(
            f"expected the {len(keys)} listed images in {root}, {len(missing)} are missing: {_some(missing)}."
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    return _Folder(root, [(key, numbers[key.split("/")[0]]) for key in keys], class_names)


def class_folders(spec: str) -> list[str]:
    """Names of the class folders of a validation folder; none where `spec` is no folder, or not of that shape."""
    path = Path(spec).expanduser()
    try:
        return _folders(_split_folder(path, _Request(spec, "val", "", "", ""))) if path.is_dir() else []
    except (OSError, UserError):
        return []


def _tar_files(members: list[tarfile.TarInfo], request: _Request) -> list[tuple[str, int, int]]:
    """(name, offset, size) of all files; a link to one of them is that file under another name."""
    files = [(member.name, member.offset_data, member.size) for member in members if member.isreg()]
    links = [member for member in members if member.islnk() or member.issym()]
    places = {posixpath.normpath(name): place for name, *place in files} if links else {}
    targets = {posixpath.normpath(link.name): _target(link) for link in links}
    lost = []
    for link in links:
        target, hops = _target(link), 0
        while target in targets and hops < len(links):  # links in a circle lead nowhere
            target, hops = targets[target], hops + 1
        if target in places:
            files.append((link.name, *places[target]))
        else:
            lost.append(f"{link.name} → {link.linkname}")
    if lost:
        raise request.error(
            f"expected links to files in {request.spec} itself, found links to folders, or out of it: {_some(sorted(lost))}. "
            "Pack it with tar --dereference, which puts the files in the links' places."
        )
    return sorted(files)


def _target(link: tarfile.TarInfo) -> str:
    """The member that a link leads to: a hard link names it, a symbolic one says the way from its own folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


class _Digits(Source):
    def __init__(self, images: np.ndarray, labels: np.ndarray, what: str) -> None:
        super().__init__(labels, [str(digit) for digit in range(10)])
        self._images, self._what = images, what

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._images[i]).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")

    def name(self, i: int) -> str:
        return f"{self._what}[{i}]"


def _open_digits(request: _Request) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels, 17 greys; 360 of them, stratified, are for validation."""
    digits = request.require("sklearn.datasets", "scikit-learn").load_digits()
    split = request.require("sklearn.model_selection", "scikit-learn").train_test_split
    train, val = split(range(len(digits.target)), test_size=360, random_state=0, stratify=digits.target)
    rows = train if request.split == "train" else val
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return _Digits(images, digits.target[rows], f"digits {request.split}")


class _Torchvision(Source):
    def __init__(self, spec: str, dataset: Any) -> None:
        # INaturalist alone has no targets; QMNIST's have further columns; ImageNet's classes are tuples of synonyms.
        labels = dataset.targets if hasattr(dataset, "targets") else [label for label, _ in dataset.index]
        names = dataset.classes if hasattr(dataset, "classes") else dataset.all_categories
        names = [name if isinstance(name, str) else ", ".join(name) for name in names]
        super().__init__(np.asarray(labels).reshape(len(dataset), -1)[:, 0], names)
        self._spec, self._dataset, self._files = spec, dataset, getattr(dataset, "samples", None)

    def image(self, i: int) -> bytes | Image.Image:
        return Path(self._files[i][0]).read_bytes() if self._files else self._dataset[i][0]

    def name(self, i: int) -> str:
        return self._files[i][0] if self._files else f"{self._spec}[{i}]"

    def key(self, i: int) -> str:
        return os.path.relpath(self._files[i][0], self._dataset.root) if self._files else self.name(i)


def _open_torchvision(request: _Request) -> Source:
    from timm.data import create_dataset  # imports much

    try:
        dataset = create_dataset(request.spec, root=request.root or ".", split=request.split_name)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise request.error(
            f"expected a data set that timm knows as {request.spec}, downloaded to data.root ({request.root or '.'}); "
            f"its split {request.split_name} cannot be opened ({error})."
        ) from error
    return _Torchvision(request.spec, dataset)


class _HuggingFace(Source):
    def __init__(self, spec: str, dataset: Any, column: str, labels: np.ndarray, names: list[str] | None) -> None:
        super().__init__(labels, names)
        self._spec, self._dataset, self._column = spec, dataset, column

    def image(self, i: int) -> bytes:
        cell = self._dataset[i][self._column]
        return cell["bytes"] or Path(cell["path"]).read_bytes()

    def name(self, i: int) -> str:
        return f"{self._spec}[{i}] {self._dataset[i][self._column]['path'] or ''}".rstrip()

    def key(self, i: int) -> str:
        return f"hfds[{i}]"  # the data set's name and the image's path may be places; to look at the latter reads the image


def _open_huggingface(request: _Request) -> Source:
    # Not timm's reader: that of 1.0.9 puts paths into lower case and dies of labels without class names.
    datasets = request.require("datasets", "datasets")
    name = request.spec.split("/", 1)[1]
    try:
        dataset = datasets.load_dataset(name, split=request.split_name, cache_dir=request.root or None)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise request.error(f"cannot open split {request.split_name} of {request.spec} ({error}).") from error
    columns = dataset.features
    image = _column(columns, "image", datasets.Image)
    label = _column(columns, "label", datasets.ClassLabel)
    if image is None or label is None:
        raise request.error(f"expected an image and a label column in {request.spec}, found {_some(list(columns))}.")
    labels = np.asarray(dataset[label][:])
    if not len(labels) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise request.error(f"expected labels from 0 on in {request.spec}, found {_some(np.unique(labels))}.")
    names = list(columns[label].names) if isinstance(columns[label], datasets.ClassLabel) else None
    return _HuggingFace(request.spec, dataset.cast_column(image, datasets.Image(decode=False)), image, labels, names)


def _column(columns: dict[str, Any], name: str, kind: type) -> str | None:
    """`name` if there is such a column, else the first column of that kind."""
    return name if name in columns else next((key for key, value in columns.items() if isinstance(value, kind)), None)


def _open_stream(request: _Request) -> StreamSource:
    kind, name = request.spec.split("/", 1)
    request.require(*_STREAM_PACKAGES[kind])
    # Not timm's create_reader: that of 1.0.9 puts names, and so paths, into lower case.
    reader_class = getattr(importlib.import_module(f"timm.data.readers.reader_{kind}"), f"Reader{kind.capitalize()}")
    # An absolute path: WebDataset runs "pipe:…" as a command.
    place = os.path.abspath(os.path.expanduser(name)) if kind == "wds" else request.root or None
    make_reader = partial(reader_class, name=name, root=place, split=request.split_name)
    try:
        reader = make_reader()
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise request.error(
            f"cannot open split {request.split_name} of {request.spec} ({error}). A wds/ folder needs _info.json, or a "
            "split that names its files and the number of samples, such as 'part-{000..099}.tar|50000'."
        ) from error
    if kind == "wds":
        if not isinstance(reader.info.get("num_classes"), int):
            raise request.error(f'expected the number of classes as "num_classes" in {place}/_info.json, found none.')
        shards = len(reader.split_info.filenames)
        return StreamSource(request.spec, make_reader, reader.num_samples, shards, None, reader.info["num_classes"])
    names = getattr((reader.builder.info.features or {}).get("label"), "names", None)
    if not names:
        raise request.error(f"expected a feature 'label' with class names in {request.spec}, found none.")
    shards = reader.builder.as_streaming_dataset(split=request.split_name).num_shards if kind == "hfids" else None
    return StreamSource(request.spec, make_reader, reader.num_samples, shards, list(names), len(names))


_OPENERS: dict[str, Callable[[_Request], Source | StreamSource]] = {
    "digits": _open_digits,
    "torch": _open_torchvision,
    "hfds": _open_huggingface,
    "hfids": _open_stream,
    "tfds": _open_stream,
    "wds": _open_stream,
}


def _opener(request: _Request) -> Callable[[_Request], Source | StreamSource]:
    kind, _, name = request.spec.partition("/")
    if not request.spec.strip():
        raise request.error("expected a folder or the name of a data set, got nothing (an unset shell variable?).")
    if kind == "digits" or kind not in _OPENERS:
        return _OPENERS.get(request.spec, _open_path)
    if not name:
        raise request.error(f"expected a name after {kind}/, got {request.spec!r}; a folder of that name is ./{kind}.")
    return _OPENERS[kind]


def _some(things: Sequence[Any] | np.ndarray) -> str:
    shown = ", ".join(str(thing) for thing in things[:8])
    return shown + (f", … ({len(things)})" if len(things) > 8 else "") if len(things) else "nothing"


class MemorySource(Source):
    """A source whose encoded images lie in shared memory: image i is `blob[offsets[i]:offsets[i + 1]]`, uint8."""

    def __init__(self, source: Source, blob: torch.Tensor, offsets: torch.Tensor) -> None:
        super().__init__(source.labels, source.class_names)
        self.num_classes, self.blob, self.offsets, self._source = source.num_classes, blob, offsets, source

    def image(self, i: int) -> bytes:
        start, end = self.offsets[i : i + 2].tolist()
        return self.blob[start:end].numpy().tobytes()

    def name(self, i: int) -> str:
        return self._source.name(i)

    def key(self, i: int) -> str:
        return self._source.key(i)


def _load_into_memory(source: Source, request: _Request, *, copies: int, progress: bool) -> MemorySource:
    """Two passes, first sizes, then bytes, so that nothing is held twice. Unreadable files become empty images."""

    def measure(chunk: range) -> list[int]:
        return [_or_if_broken(source.size, i, 0) for i in chunk]

    def fill(chunk: range) -> int:
        for i in chunk:
            data = _or_if_broken(partial(_encoded, source), i, b"")
            if len(data) != offsets[i + 1] - offsets[i]:
                raise request.error(f"{source.name(i)} changed while it was read into memory.")
            array[offsets[i] : offsets[i + 1]] = np.frombuffer(data, np.uint8)
        return len(chunk)

    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    with ThreadPoolExecutor(_LOADING_THREADS) as threads:
        sizes = [size for chunk in threads.map(measure, chunks) for size in chunk]
        offsets = np.cumsum([0, *sizes])
        _check_memory(int(offsets[-1]), request, copies)
        blob = torch.empty(int(offsets[-1]), dtype=torch.uint8).share_memory_()
        array = blob.numpy()
        with tqdm(total=len(source), desc=request.flag, unit=" images", disable=not progress) as bar:
            for count in threads.map(fill, chunks):
                bar.update(count)
    return MemorySource(source, blob, torch.from_numpy(offsets).share_memory_())


def _encoded(source: Source, i: int) -> bytes:
    image = source.image(i)
    return image if isinstance(image, bytes) else _png(image)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    decode(image).save(file, "PNG")  # lossless
    return file.getvalue()


def _or_if_broken(get: Callable[[int], T], i: int, otherwise: T) -> T:
    try:
        return get(i)
    except DECODE_ERRORS:
        return otherwise  # the loader meets an empty image there, and names it


def _check_memory(size: int, request: _Request, copies: int) -> None:
    available = {"memory": psutil.virtual_memory().available, "/dev/shm": shutil.disk_usage("/dev/shm").free}
    if size * copies > min(available.values()):
        free = ", ".join(f"{amount / 2**30:.2f} GiB of {where}" for where, amount in available.items())
        raise request.error(
            f"keeping {request.spec} in memory needs {size * copies / 2**30:.2f} GiB ({copies} × {size / 2**30:.2f}), "
            f"available are {free}. Use data.in_memory=0."
        )
