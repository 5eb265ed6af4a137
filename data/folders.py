"""Folders and tars of class folders, and the listed images of a validation folder."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.errors import UserError
from data.labels import Classes, read_assignment
from data.source import Request, Source, some

_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation")}
_HIDDEN = re.compile(r"(^|/)(\.(?!\.?(/|$))|__MACOSX(/|$))")  # not . and ..; macOS adds __MACOSX to ZIPs
_THREADS = 16


class LooseImages(UserError):
    """A folder contains images, but none of the expected class folders."""


class _Folder(Source):
    of_folders = True

    def __init__(self, root: Path, samples: list[tuple[str, int]], class_names: list[str]) -> None:
        """Store `samples`: paths below `root`, and labels."""
        super().__init__([label for _, label in samples], class_names)
        self._root = str(root)
        # One array: the reference counts of Python strings would copy their memory pages into each worker.
        self._paths = np.array([os.fsencode(path) for path, _ in samples])

    def image(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()

    def name(self, i: int) -> str:
        return os.path.join(self._root, self.key(i))

    def key(self, i: int) -> str:
        return os.fsdecode(self._paths[i])

    def size(self, i: int) -> int:
        return os.stat(self.name(i)).st_size


def open_path(request: Request) -> Source:
    path = Path(request.spec).expanduser().absolute()
    try:
        if path.is_dir():
            return _open_folder(path, request)
        if path.is_file() and path.suffix == ".tar":
            return _open_tar(path, request)
        found = "a file" if path.is_file() else "nothing"
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path} ({error.strerror or error}).") from error
    kinds = "a folder of class folders, a .tar of them, digits, or hfds/… hfids/… tfds/… torch/… wds/…"
    raise UserError(f"expected {kinds}, found {found} at {path}.")


def _open_folder(path: Path, request: Request) -> Source:
    root = _split_folder(path, request)
    names = _folders(root)
    if not names:
        raise _no_class_folders(root)
    lost = sorted(
        e.name for e in os.scandir(root) if not hidden(e.name) and e.is_symlink() and not os.path.exists(e.path)
    )
    if lost:  # each may be a class
        raise UserError(f"expected class folders in {root}, found broken links: {some(lost)}.")
    samples = [(path, number) for number, name in enumerate(names) for path in _images_below(str(root), name)]
    empty = sorted(set(names) - {names[label] for _, label in samples})
    # A class without images is a mistake in the training set; a validation set may lack some.
    if empty and (request.split == "train" or not samples):
        endings = " ".join(IMG_EXTENSIONS)
        raise UserError(f"expected images ({endings}) in the class folders of {root}, found none in {some(empty)}.")
    return _Folder(root, samples, names)


def _no_class_folders(folder: Path) -> UserError:
    """Return an error that says what a folder without class folders contains, and what to do about it."""
    loose = sum(_is_image(entry.name) for entry in os.scandir(folder))
    found = _unsorted_imagenet(folder) or f"and {loose} loose images."
    return (LooseImages if loose else UserError)(
        f"expected a sub-folder for each class in {folder}, found none, {found}"
    )


def _unsorted_imagenet(folder: Path) -> str:
    """Return what to do with ImageNet's validation set as extracted from its archive; empty if the folder has no such images."""
    loose = sum(entry.name.startswith("ILSVRC2012_val_") for entry in os.scandir(folder) if entry.is_file())
    if not loose:
        return ""
    return (
        f"but {loose} loose images of ImageNet's validation set. To sort them into folders by class, put "
        "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into a folder and run, in it: "
        """python -c "import torchvision; torchvision.datasets.ImageNet('.', split='val')"; then give that folder here."""
    )


def _split_folder(path: Path, request: Request) -> Path:
    # A class may be called "train" too: only a folder of folders is a split.
    splits = {
        split: [path / name for name in names if (path / name).is_dir() and _folders(path / name)]
        for split, names in _SPLIT_FOLDERS.items()
    }
    if splits[request.split]:
        return splits[request.split][0]
    for name in _SPLIT_FOLDERS[request.split]:
        if (path / name).is_dir() and _unsorted_imagenet(path / name):
            raise _no_class_folders(path / name)
    if any(splits.values()):
        expected = " or ".join(_SPLIT_FOLDERS[request.split])
        raise UserError(f"expected {expected} with class folders in {path}, found {some(_folders(path))}.")
    return path


def _folders(path: Path) -> list[str]:
    here = [os.path.realpath(path)]
    entries = [entry for entry in os.scandir(path) if not hidden(entry.name) and _is_folder(entry)]
    return sorted(e.name for e in entries if not (e.is_symlink() and _leads_back(os.path.realpath(e.path), here)))


def hidden(path: str) -> bool:
    """Return whether a file, or a folder above it, is hidden. For example, macOS puts a `._name.JPEG` beside each file."""
    return _HIDDEN.search(path) is not None


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMG_EXTENSIONS) and not hidden(path)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # circular links
            return False
        raise


def _is_file_or_lost(entry: os.DirEntry) -> bool:
    """Return whether it is a file, or a broken link, which is reported when read. Reading a pipe would block for ever."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError as error:
        if error.errno == errno.ELOOP:
            return True
        raise


def _leads_back(folder: str, above: list[str]) -> bool:
    """Return whether `folder` is one of the folders `above`, or contains one of them; all are real paths."""
    return any(os.path.join(other, "").startswith(os.path.join(folder, "")) for other in above)


def _images_below(root: str, folder: str) -> list[str]:
    """Return the paths below `root` of the images in `root`/`folder` and deeper, sorted by folder, then by name."""
    above = [os.path.realpath(root), os.path.realpath(os.path.join(root, folder))]
    return [
        f"{below}/{name}"
        for below, names in sorted(_walk(root, folder, above))
        for name in sorted(names)
        if _is_image(name)
    ]


def _walk(root: str, folder: str, above: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files) for `root`/`folder` and all folders below it that are not hidden.

    `above`: real paths of the folders above it, and its own.
    """
    names, folders = [], []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if hidden(entry.name):
                continue
            if not _is_folder(entry):
                if _is_file_or_lost(entry):
                    names.append(entry.name)
                continue
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if not _leads_back(real, above):
                folders.append((f"{folder}/{entry.name}", real))
    yield folder, names
    for below, real in folders:
        yield from _walk(root, below, [*above, real])


class _Tar(Source):
    of_folders = True

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


def _open_tar(path: Path, request: Request) -> Source:
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(tar)
            # A damaged or missing header ends the list without an error.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"at byte {tar.offset}, there is neither a header nor the end marker")
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a complete, uncompressed tar file ({error}).") from error
    images = [file for file in _tar_files(members, request) if file[0].lower().endswith(IMG_EXTENSIONS)]
    # The folder that contains all of them may be hidden.
    shared = os.path.commonprefix([name for name, _, _ in images]).rfind("/") + 1
    images = [file for file in images if not hidden(file[0][shared:])]
    folders = [PurePosixPath(name).parent.parts for name, _, _ in images]
    # In a tar packed from outside the data set's folder, all paths begin with that folder.
    splits = {name for names in _SPLIT_FOLDERS.values() for name in names}
    while folders and all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        if folders[0][0] in splits:
            break
        folders = [parts[1:] for parts in folders]
    tops = {parts[0] for parts in folders if len(parts) > 1}
    split = next((name for name in _SPLIT_FOLDERS[request.split] if name in tops), None)
    if split is None and tops & splits:
        expected = " or ".join(_SPLIT_FOLDERS[request.split])
        raise UserError(f"expected {expected} with class folders in {path}, found {some(sorted(tops))}.")
    kept = [i for i, parts in enumerate(folders) if (parts if split is None else parts[:1] == (split,) and parts[1:])]
    if not kept:
        raise UserError(f"expected class folders with images in {path}, found {len(images)} loose images.")
    depth = 0 if split is None else 1  # deeper folders belong to the class, as in a folder of class folders
    return _Tar(path, [images[i] for i in kept], [folders[i][depth] for i in kept])


def open_listed(spec: str, keys: Sequence[str], class_names: list[str]) -> Source:
    """Open the images `keys` (`<class>/<file>`) of a validation folder, in their order; labels are indices in `class_names`.

    Args:
        spec: folder of class folders, or one that contains such a folder as `val/` or `validation/`.
        keys: paths below it.
        class_names: the class folders.

    Raises:
        UserError: no such folder, or class folders or files of the list are missing in it.
    """
    request = Request(spec, "val", "", "")
    path = Path(spec).expanduser().absolute()
    try:
        if not path.is_dir():
            raise UserError(
                f"expected a folder of class folders, found {'a file' if path.is_file() else 'nothing'} at {path}."
            )
        root = _split_folder(path, request)
        present = set(_folders(root))
        if not present:
            raise _no_class_folders(root)
        absent = sorted({key.split("/")[0] for key in keys} - present)
        if absent:
            raise UserError(
                f"expected the folders of all {len(class_names)} classes in {root}, missing: {some(absent)}."
            )
        with ThreadPoolExecutor(_THREADS) as threads:
            exist = list(threads.map(lambda key: (root / key).is_file(), keys))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}).") from error
    missing = [key for key, exists in zip(keys, exist) if not exists]
    if missing:
        raise UserError(
            f"expected the {len(keys)} listed images in {root}, {len(missing)} are missing: {some(missing)}."
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    return _Folder(root, [(key, numbers[key.split("/")[0]]) for key in keys], class_names)


def open_labelled(spec: str, path: Path, classes: Classes) -> Source:
    """Open the images of a folder that the file `path` lists with their classes (`read_assignment`), in its order.

    Other images are skipped. The file may list images without their file extensions.

    Raises:
        UserError: no such folder or file, a malformed line, or a listed image that is missing or ambiguous.
    """
    root = Path(spec).expanduser().absolute()

    @cache
    def files(folder: str) -> dict[str, list[str]]:
        """Return the files of a folder below `root` by name, images also by name without extension."""
        names, found = [], defaultdict(list)
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
        for name in filter(_is_image, names):
            found[os.path.splitext(name)[0]].append(name)
        return found | {name: [name] for name in names}

    def find(key: str) -> str | None:
        folder, name = posixpath.split(key)
        if folder.split("/")[0] in ("", "..") and folder:
            raise UserError(f"expected an image in {root}, got {key}, which is outside of it.")
        same = files(folder).get(name, [])
        if len(same) > 1:
            raise UserError(f"expected one image called {key} in {root}, found {some(same)}.")
        return posixpath.join(folder, same[0]) if same else None

    try:
        if not root.is_dir():
            found = "a file" if root.is_file() else "nothing"
            raise UserError(f"expected a folder with the listed images, found {found} at {root}.")
        listed = read_assignment(path, classes, find)
        missing = [key for key in listed if find(key) is None]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root} ({error.strerror or error}).") from error
    if missing:
        raise UserError(
            f"{listed[missing[0]][1]}: expected an image in {root}, there is no {missing[0]}; missing in total: {len(missing)}."
        )
    source = _Folder(root, [(key, label) for key, (label, _) in listed.items()], classes.names)
    source.classes = np.unique(source.labels).tolist()
    return source


def class_folders(spec: str) -> list[str]:
    """Return the names of the class folders of a validation folder; empty if `spec` is no folder or has another layout."""
    path = Path(spec).expanduser().absolute()
    try:
        return _folders(_split_folder(path, Request(spec, "val", "", ""))) if path.is_dir() else []
    except (OSError, UserError):
        return []


def _tar_files(members: list[tarfile.TarInfo], request: Request) -> list[tuple[str, int, int]]:
    """Return (name, offset, size) of all files; a link to one of them counts as that file under another name."""
    # Keyed by normalised name, as after extraction: a member replaces an earlier one of the same name (tar -r).
    files: dict[str, tuple[str, int, int]] = {}
    links: dict[str, tarfile.TarInfo] = {}
    for member in members:
        name = posixpath.normpath(member.name)
        # Resolved now, because a later member may take that name.
        same = files.get(_target(member)) if member.islnk() else None
        files.pop(name, None)
        links.pop(name, None)
        if member.isreg():
            files[name] = (member.name, member.offset_data, member.size)
        elif same is not None:
            files[name] = (member.name, *same[1:])
        elif member.islnk() or member.issym():
            links[name] = member
    targets = {name: _target(link) for name, link in links.items()}
    linked, lost = [], []
    for link in links.values():
        target, hops = _target(link), 0
        while target in targets and hops < len(links):  # circular links are lost
            target, hops = targets[target], hops + 1
        if target in files:
            linked.append((link.name, *files[target][1:]))
        else:
            lost.append(f"{link.name} → {link.linkname}")
    if lost:
        raise UserError(
            f"expected only links to files in {request.spec} itself, found links to folders or to the outside: "
            f"{some(sorted(lost))}. Pack it with tar --dereference, which replaces links by their files."
        )
    return sorted([*files.values(), *linked])


def _target(link: tarfile.TarInfo) -> str:
    """Return the member that a link points to. A hard link contains its name, a symbolic one the path from its own folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))
