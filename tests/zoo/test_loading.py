"""Strict loading: every layout fits or is refused by name, never partly."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from common.errors import UserError
from utils_architecture import ARCHITECTURES, get_new_model, normalize_model
from zoo.description import NetworkDescription
from zoo.inference import describe_weights
from zoo.loading import NORMALIZERS, load_weights, parse_weights, read_weights
from zoo.runs import load_trained

MICRO = ["convnext_micro", "convnext_iso_micro", "vit_micro"]
VARIANTS = [
    (arch, stem) for arch, entry in ARCHITECTURES.items() for stem in (False, True) if entry.conv_stem or not stem
]


def micro(seed=0, num_classes=4, not_original=True, arch="convnext_micro", **arguments):
    torch.manual_seed(seed)
    return get_new_model(arch, not_original=not_original, num_classes=num_classes, **arguments)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def with_normalizer(state):
    return normalize_model(nn.Identity()).state_dict() | prefixed(state, "model.")


def zeros(state):
    return {name: value.new_zeros(()).expand(value.shape) for name, value in state.items()}


LAYOUTS = {
    "plain": lambda s: s,
    "module": lambda s: prefixed(s, "module."),
    "base_model": lambda s: prefixed(s, "base_model."),
    "both": lambda s: prefixed(s, "module.base_model."),
    "compiled": lambda s: prefixed(s, "module._orig_mod."),
    "model": lambda s: prefixed(s, "model."),
    "EMA": lambda s: {
        "state_dict": prefixed(zeros(s), "module."),
        "state_dict_ema": prefixed(s, "module."),
        "epoch": 3,
    },
    "EMA alone": lambda s: {"model_ema": {"module": s}},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(9)} | prefixed(s, "module."),
    "full state": lambda s: {
        "model": prefixed(s, "module."),
        "ema": None,
        "step": 3,
        "optimizer": {"lr": 0.1, "state": {}},
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 7},
    "nested": lambda s: {"model": {"model_state_dict": s, "name": "x"}, "epoch": 7},
    "plain values between": lambda s: {"epoch": 7, "arch": "x", "best": 0.5} | s,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalized", [False, True])
def test_round_trip(tmp_path, layout, normalized):
    source = normalize_model(micro(1)) if normalized else micro(1)
    target = normalize_model(micro(2)) if normalized else micro(2)
    path = tmp_path / "w.pt"
    torch.save(LAYOUTS[layout](source.state_dict()), path)
    load_weights(target, read_weights(path), source=path)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize("arch", MICRO)
@pytest.mark.parametrize("not_original", [False, True])
def test_logits_stay(tmp_path, arch, not_original):
    """One file of each micro with all that can be around it; only what the file itself says is used to build the network."""
    source = normalize_model(
        micro(1, arch=arch, not_original=not_original, num_classes=7), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    )
    path, x = tmp_path / "w.pt", torch.rand(2, 3, 32, 32)
    torch.save({"ema": prefixed(source.state_dict(), "module._orig_mod.base_model.")}, path)
    trained = load_trained(path, NetworkDescription())
    assert torch.equal(trained.model(x), source.eval()(x))


@functools.cache
def numbered_state(arch, not_original):
    """Return its state dict; each tensor repeats one distinct number, stored once, so large tensors take no memory or disk."""
    shapes = state_without_values(arch, not_original)
    return {
        name: torch.tensor(i, dtype=value.dtype).expand(value.shape)
        for i, (name, value) in enumerate(shapes.items(), 1)
    }


@contextlib.contextmanager
def no_values():
    """Models built here have names and shapes but no numbers."""
    # timm reads the numbers of a linspace while building (drop path rates).
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
        yield


@functools.cache
def state_without_values(arch, not_original):
    with no_values():
        return get_new_model(arch, not_original=not_original).state_dict()


@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_every_architecture_in_several_layouts(tmp_path, number):
    """Read and described as it was, from files of three layouts, with or without the normaliser; each layout has its turns."""
    arch, not_original = VARIANTS[number]
    state, path = numbered_state(arch, not_original), tmp_path / "w.pt"
    layouts = list(itertools.product(("plain", "module", "base_model", "both", "EMA", "full state"), (False, True)))
    for turn in (number, number + 3, number + 8):
        layout, normalized = layouts[turn % len(layouts)]
        torch.save(LAYOUTS[layout](with_normalizer(state) if normalized else state), path)
        weights = read_weights(path)
        assert list(weights.network) == list(state) and (weights.normalizer is not None) == normalized
        for name, value in state.items():
            found = weights.network[name]
            assert found.shape == value.shape and found.dtype == value.dtype
            first = (0,) * value.ndim  # not flatten(), which would write all of them out
            assert found[first] == value[first], (layout, name)
        assert weights.key == {"EMA": "state_dict_ema", "full state": "model"}.get(layout, "")
    found = describe_weights(weights)
    assert arch in found.candidates and found.not_original is not_original and found.num_classes == 1000
    assert found.add_normalization == normalized


@pytest.mark.parametrize("arch, not_original", VARIANTS)
def test_every_architecture_in_safetensors(tmp_path, arch, not_original):
    """The format's header before a hole in the file: tensors of zeros that take no room on the disk."""
    header, end, sizes = {}, 0, {torch.float32: ("F32", 4), torch.int64: ("I64", 8)}
    state = state_without_values(arch, not_original)
    for name, value in state.items():
        kind, size = sizes[value.dtype]
        offsets, end = [end, end + size * value.numel()], end + size * value.numel()
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    weights = read_weights(path)
    assert {name: value.shape for name, value in weights.network.items()} == {n: v.shape for n, v in state.items()}
    assert arch in describe_weights(weights).candidates


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors(tmp_path, name):
    path = tmp_path / name
    source, target = micro(1), micro(2)
    safetensors.torch.save_file(source.state_dict(), path)
    load_weights(target, read_weights(path), source=path)
    assert torch.equal(target.head.fc.weight, source.head.fc.weight)


def test_files_of_old_torch(tmp_path):
    path, source, target = tmp_path / "w.pt", micro(1), micro(2)
    torch.save({"state_dict": source.state_dict()}, path, _use_new_zipfile_serialization=False)
    load_weights(target, read_weights(path), source=path)
    assert torch.equal(target.head.fc.weight, source.head.fc.weight)


@pytest.mark.parametrize("prefixes", list(itertools.permutations(("module.", "base_model.", "_orig_mod.", "net."))))
def test_prefixes_in_any_order(prefixes):
    state = micro(1).state_dict()
    weights = parse_weights(prefixed(state, "".join(prefixes)), source="x")
    assert list(weights.network) == list(state)
    between = prefixed(with_normalizer(prefixed(state, "".join(prefixes[2:]))), "".join(prefixes[:2]))
    weights = parse_weights(between, source="x")
    assert list(weights.network) == list(state) and weights.normalizer is not None


@pytest.mark.parametrize("module", ["", "normalize.", "normalizer.", "norm_layer.", "preprocess.", "0.", "any."])
@pytest.mark.parametrize("pair", NORMALIZERS)
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_normalisers_by_their_keys(module, pair, shape):
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    statistics = dict(zip(pair, (mean.reshape(shape), std.reshape(shape))))
    state = prefixed(statistics, module) | prefixed(micro(1).state_dict(), "model.")
    target = normalize_model(micro(2))
    load_weights(target, parse_weights(state, source="x"), source="x")
    assert target.normalize.mean.flatten().tolist() == mean.tolist()
    assert target.normalize.std.flatten().tolist() == std.tolist()


@pytest.mark.parametrize(
    "key, found, factor", [(None, "model_ema", 1), ("model_ema", "model_ema", 1), ("model", "model", 0)]
)
def test_average_or_raw(key, found, factor):
    state = micro(1).state_dict()
    weights = parse_weights({"model": zeros(state), "model_ema": state}, source="x", key=key)
    assert weights.key == found
    assert all(torch.equal(weights.network[name], value * factor) for name, value in state.items())


def test_statistics_of_something_else_are_no_normaliser():
    state, statistics = micro(1).state_dict(), {"loss.mean": torch.tensor(3.0), "loss.std": torch.tensor(0.1)}
    weights = parse_weights({"model": state, **statistics}, source="x")
    assert weights.normalizer is None and list(weights.network) == list(state)


def test_one_of_several_networks_by_its_key(tmp_path):
    path, teacher, student = tmp_path / "w.pt", micro(1).state_dict(), micro(2).state_dict()
    torch.save({"run": {"teacher": teacher, "student": {"model": zeros(student), "ema": student}}, "args": 3}, path)
    for key, expected in (
        ("run.teacher", teacher),
        ("run.student", student),
        ("run.student.model", zeros(student)),
        ("run.student.ema", student),
    ):
        weights = read_weights(path, key=key)
        assert weights.key.startswith(key) and all(torch.equal(weights.network[n], v) for n, v in expected.items())
    for key in ("teacher", "run.teach", "args"):
        with pytest.raises(UserError, match=f"expected weights under the key {key}, found only run.teacher, run.stud"):
            read_weights(path, key=key)


@pytest.mark.parametrize("average", [lambda p: {"shadow_params": list(p), "decay": 0.9}, lambda p: list(p)])
def test_averages_as_lists(tmp_path, average):
    """As torch_ema keeps them; statistics of batch normalisation are not in them, so the raw ones stay."""
    raw, averaged = (get_new_model("resnet50", num_classes=2) for _ in range(2))
    raw.bn1.running_mean.add_(1)
    path = tmp_path / "w.pt"
    torch.save({"model": prefixed(raw.state_dict(), "module."), "ema": average(averaged.parameters())}, path)
    assert torch.equal(read_weights(path, key="model").network["fc.bias"], raw.fc.bias)
    if isinstance(average([]), list):  # of no known key: as if it were not there
        assert read_weights(path).key == "model"
        return
    weights = read_weights(path)
    assert weights.key == "ema.shadow_params"
    for name, value in (raw.state_dict() | dict(averaged.named_parameters())).items():
        assert torch.equal(weights.network[name], value), name


def test_a_list_that_fits_two_networks_is_no_average_of_either():
    state = micro(1).state_dict()
    lists = [{"shadow_params": values} for values in (list(state.values()), list(zeros(state).values()), [])]
    with pytest.raises(UserError, match="expected one model, found 2: a, b;"):
        parse_weights({"a": state, "b": zeros(state), "ema": lists[0]}, source="x")
    content = dict(zip(("model", "ema_1", "ema_2", "ema_3"), [state, *lists]))
    with pytest.raises(UserError, match="expected one model, found 2: ema_1.shadow_params, ema_2.shadow_params;"):
        parse_weights(content, source="x")
    weights = parse_weights(content, source="x", key="ema_2")
    assert weights.key == "ema_2.shadow_params" and not any(value.any() for value in weights.network.values())


@pytest.mark.parametrize("mean, std", [((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), ((0, 0, 0), (255,) * 3)])
def test_normalisers_of_images_up_to_255(mean, std):
    content = {"mean": torch.tensor(mean).float(), "std": torch.tensor(std).float()} | prefixed(state(), "model.")
    target = normalize_model(micro(2)).double()
    load_weights(target, parse_weights(content, source="x"), source="x")
    bare, x = micro(1).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (mean, std))
    torch.testing.assert_close(target.eval()(x), bare.eval()((255 * x - mean) / std), rtol=0, atol=1e-5)


def test_batch_norm_counters_are_weights(tmp_path):
    path = tmp_path / "w.pt"
    source, target = (get_new_model("resnet50", num_classes=2) for _ in range(2))
    source.bn1.num_batches_tracked.fill_(123)
    torch.save(source.state_dict(), path)
    load_weights(target, read_weights(path), source=path)
    assert target.bn1.num_batches_tracked == 123


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    state, target = micro(1).to(dtype).state_dict(), micro(2)
    load_weights(target, parse_weights(state, source="x"), source="x")
    assert torch.equal(target.head.fc.weight, state["head.fc.weight"].float())


@pytest.mark.parametrize("not_original", [False, True])
def test_position_embeddings_of_another_resolution(not_original):
    """As the model of that resolution sees images of this one: it interpolates in its forward pass."""
    source = micro(1, arch="vit_micro", not_original=not_original, img_size=48).eval()
    target = micro(2, arch="vit_micro", not_original=not_original).eval()
    weights = parse_weights(source.state_dict(), source="x")
    assert describe_weights(weights).img_size == 48
    load_weights(target, weights, source="x")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=1e-6)
    assert torch.equal(target.pos_embed[:, :1], source.pos_embed[:, :1])  # the class token's is kept


def test_weights_without_normaliser_fit_a_model_with_one(tmp_path):
    path, source, target = tmp_path / "w.pt", micro(1), normalize_model(micro(2))
    torch.save(source.state_dict(), path)
    load_weights(target, read_weights(path), source=path)
    assert torch.equal(target.model.head.fc.weight, source.head.fc.weight)


# ------------------------------------------------------------------------------------------------ wrong files
class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


@dataclass(frozen=True)
class Wrong:
    """A file, as an object to save or as bytes, and words of the error."""

    content: Callable[[], Any]
    words: tuple[str, ...]
    arch: str = "convnext_micro"
    key: str | None = None
    name: str = "w.pt"


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def state(**arguments):
    return micro(1, **arguments).state_dict()


def changed(arch="convnext_micro", **values):
    """The right weights, with `__` for a dot; None takes a name away."""
    new = state(arch=arch) | {name.replace("__", "."): value for name, value in values.items()}
    return {name: value for name, value in new.items() if value is not None}


def flipped():
    data = bytearray(saved(state()))
    middle = len(data) // 2
    data[middle : middle + 256] = bytes(
        byte ^ 0x40 for byte in data[middle : middle + 256]
    )  # more than a record's padding
    return bytes(data)


def archive(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name in names:
            content.writestr(name, "text")
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


def optimizer():
    model = micro()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def normalizer(mean=None, std=None):
    values = {"normalize.mean": mean, "normalize.std": std}
    return {name: value for name, value in values.items() if value is not None} | prefixed(state(), "model.")


THREE = torch.full((1, 3, 1, 1), 0.5)
WRONG = {
    # files that hold no weights
    "empty": Wrong(lambda: b"", ("is empty",)),
    "web page": Wrong(lambda: b"<!DOCTYPE html><title>Log in</title>", ("web page",)),
    "text": Wrong(lambda: b"see the other folder", ("is text",)),
    "LFS pointer": Wrong(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("git lfs pull",)),
    "truncated": Wrong(lambda: saved(state())[:5000], ("end is missing",)),
    "flipped bit": Wrong(flipped, ("checksum", "damaged")),
    "noise": Wrong(lambda: np.random.default_rng(0).bytes(999), ("damaged or of another format",)),
    "pickle with code": Wrong(lambda: pickle.dumps(Evil(), protocol=2), ("Python objects or code", "open")),
    "whole model": Wrong(lambda: nn.Linear(2, 2), ("does not fit", "84 tensors expected, 2 found")),
    "NumPy arrays": Wrong(lambda: {"head.fc.bias": np.zeros(4)}, ("does not fit", "84 tensors expected, 1 found")),
    "NumPy objects": Wrong(
        lambda: {"head.fc.bias": np.array([None, Evil()])}, ("no state dict", "a mapping with head.fc.bias")
    ),
    "NumPy's other byte order": Wrong(lambda: {"bias": np.zeros(4, ">f4")}, ("no state dict", "a mapping with bias")),
    "ZIP of something else": Wrong(lambda: archive("clean.pt", "logs/aa.txt"), ("archive of other files", "clean.pt")),
    "TorchScript": Wrong(scripted, ("TorchScript", "state_dict")),
    "safetensors with a bad header": Wrong(
        lambda: struct.pack("<Q", 20) + b"{" + b"x" * 19, ("damaged or of another format",), name="w.safetensors"
    ),
    "safetensors cut": Wrong(
        lambda: safetensors.torch.save(state())[:-8], ("damaged or of another format",), name="w.safetensors"
    ),
    # weights files without a state dict, or with the wrong one
    "list": Wrong(lambda: list(state().values()), ("no state dict", "a list")),
    "tensor": Wrong(lambda: torch.zeros(3), ("no state dict", "a Tensor")),
    "numbers": Wrong(lambda: {"a": 1, "b": [2]}, ("no state dict", "a mapping with a, b")),
    "empty mapping": Wrong(dict, ("no state dict", "no entries")),
    "empty container": Wrong(lambda: {"state_dict": {}, "epoch": 3}, ("no state dict", "state_dict, epoch")),
    "optimiser only": Wrong(optimizer, ("no state dict", "param_groups")),
    "optimiser in a state": Wrong(
        lambda: {"optimizer": optimizer(), "step": torch.tensor(3)}, ("no state dict", "optimizer")
    ),
    "list among tensors": Wrong(lambda: changed(head__fc__bias=[0.0] * 4), ("head.fc.bias is missing",)),
    "numbers as names": Wrong(lambda: dict(enumerate(state().values())), ("the key 0",)),
    "EMA not there": Wrong(lambda: {"model": state()}, ("expected weights under the key ema", "only model"), key="ema"),
    "EMA of a bare file": Wrong(state, ("expected weights under the key ema", "only the file itself"), key="ema"),
    "EMA as a list of another network": Wrong(
        lambda: {"model": state(), "ema": {"shadow_params": list(state().values())[1:]}},
        ("expected weights under the key ema", "only model"),
        key="ema",
    ),
    "raw not there": Wrong(lambda: {"ema": state()}, ("expected weights under the key model", "only ema"), key="model"),
    "two models": Wrong(
        lambda: {"model": state(), "state_dict": state()},
        ("one model, found 2", "model, state_dict; select by weights_key"),
    ),
    # weights of something else
    "other architecture": Wrong(
        lambda: state(arch="convnext_iso_micro"), ("does not fit", "instead of", "Do arch, not_original")
    ),
    "other stem": Wrong(lambda: state(not_original=False), ("stem.stem.0.weight is missing", "not_original")),
    "other classes": Wrong(lambda: state(num_classes=10), ("head.fc.weight is [10, 112] instead of [4, 112]",)),
    "missing": Wrong(lambda: changed(head__fc__bias=None), ("head.fc.bias is missing",)),
    "surplus": Wrong(lambda: changed(surplus=torch.zeros(1)), ("surplus is unexpected",)),
    "missing and surplus": Wrong(
        lambda: changed(head__fc__bias=None, surplus=torch.zeros(1)),
        ("head.fc.bias is missing; surplus is unexpected",),
    ),
    "prefix on all but one": Wrong(
        lambda: prefixed(state(), "module.") | {"head.fc.bias": torch.zeros(4)},
        ("(84 tensors expected, 85 found)", "stem.stem.0.weight is missing"),
    ),
    "shape": Wrong(lambda: changed(head__norm__bias=torch.zeros(3)), ("head.norm.bias is [3] instead of [112]",)),
    "half of the names": Wrong(
        lambda: dict(list(state().items())[::2]), ("(84 tensors expected, 42 found)", "and 37 more")
    ),
    "complex": Wrong(
        lambda: changed(head__fc__bias=torch.zeros(4) * 1j), ("head.fc.bias is complex64 instead of float32",)
    ),
    "integers": Wrong(
        lambda: changed(head__fc__bias=torch.zeros(4, dtype=torch.int64)), ("head.fc.bias is int64 instead of float32",)
    ),
    "float8": Wrong(
        lambda: changed(head__fc__bias=torch.zeros(4).to(torch.float8_e5m2)), ("float8_e5m2 instead of float32",)
    ),
    "sparse": Wrong(lambda: changed(head__fc__bias=torch.zeros(4).to_sparse()), ("is sparse or quantised",)),
    "quantised": Wrong(
        lambda: changed(head__fc__bias=torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)),
        ("is sparse or quantised",),
    ),
    "no values": Wrong(lambda: changed(head__fc__bias=torch.empty(4, device="meta")), ("a shape without values",)),
    "NaN": Wrong(
        lambda: changed(head__fc__bias=torch.full((4,), math.nan)), ("values that are not finite: head.fc.bias",)
    ),
    "infinite": Wrong(
        lambda: changed(head__fc__bias=torch.full((4,), math.inf)), ("values that are not finite: head.fc.bias",)
    ),
    # normalisers
    "normaliser for a model without": Wrong(lambda: normalizer(THREE, THREE), ("build it with add_normalization",)),
    "half a normaliser": Wrong(lambda: normalizer(mean=THREE), ("normalize.mean and no normalize.std",)),
    "other half": Wrong(lambda: normalizer(std=THREE), ("normalize.std and no normalize.mean",)),
    "two normalisers": Wrong(
        lambda: with_normalizer(with_normalizer(state())), ("normalize.mean and a second normaliser",)
    ),
    "normaliser of one channel": Wrong(
        lambda: normalizer(THREE, torch.ones(1, 1, 1, 1)), ("normalize.std is [1, 1, 1, 1]",)
    ),
    "normaliser of integers": Wrong(
        lambda: normalizer(THREE, torch.ones(3, dtype=torch.int64)), ("normalize.std is int64",)
    ),
    "normaliser with NaN": Wrong(lambda: normalizer(THREE * math.nan, THREE), ("normalize.mean is not finite",)),
    "division by zero": Wrong(lambda: normalizer(THREE, THREE * 0), ("normalize.std: expected positive values",)),
    # more than anyone has memory for
    "a head of 10^12 classes": Wrong(
        lambda: changed(head__fc__weight=torch.zeros(1).expand(10**12, 112)),
        ("at most 1073741824 elements", "head.fc.weight, [1000000000000, 112]"),
    ),
    "positions of 10^10 patches": Wrong(
        lambda: changed("vit_micro", pos_embed=torch.zeros(1).expand(1, 10**10 + 1, 128)),
        ("at most 1073741824 elements", "pos_embed"),
        arch="vit_micro",
    ),
    # position embeddings
    "positions of no square": Wrong(
        lambda: changed("vit_micro", pos_embed=torch.zeros(1, 60, 128)),
        ("pos_embed is [1, 60, 128] instead of [1, 65, 128], nor of another square image",),
        arch="vit_micro",
    ),
    "positions of another width": Wrong(
        lambda: changed("vit_micro", pos_embed=torch.zeros(1, 145, 64)),
        ("pos_embed is [1, 145, 64]",),
        arch="vit_micro",
    ),
    "positions of the class token alone": Wrong(
        lambda: changed("vit_micro", pos_embed=torch.zeros(1, 1, 128)), ("pos_embed is [1, 1, 128]",), arch="vit_micro"
    ),
    "positions resize, but something else is wrong": Wrong(
        lambda: changed("vit_micro", pos_embed=torch.zeros(1, 145, 128), norm__bias=None),
        ("(88 tensors expected, 87 found): norm.bias is missing. ",),
        arch="vit_micro",
    ),
    "positions with NaN": Wrong(
        lambda: changed("vit_micro", pos_embed=torch.full((1, 145, 128), math.nan)),
        ("not finite: pos_embed",),
        arch="vit_micro",
    ),
}


@pytest.mark.filterwarnings(
    "ignore"
)  # PyTorch's, about TorchScript, quantised tensors and pickles that only this test writes
@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path, case, monkeypatch):
    """Refused in so many words, with nothing of it run or loaded."""
    monkeypatch.chdir(tmp_path)
    wrong = WRONG[case]
    content, path, target = wrong.content(), tmp_path / wrong.name, micro(arch=wrong.arch)
    path.write_bytes(content if isinstance(content, bytes) else saved(content))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(target, read_weights(path, key=wrong.key), source=path)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert str(path) in str(error.value)
    for words in wrong.words:
        assert words in str(error.value).replace(str(path), "")  # the folder is called after the case
    assert not (tmp_path / "evil").exists()


def test_list_of_records(tmp_path):
    """No checksum covers it: whatever byte of it is wrong, the file is refused or the weights are right."""
    path, expected = tmp_path / "w.pt", {"weight": torch.arange(300.0), "bias": torch.full((7,), 2.0)}
    torch.save(expected, path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as content:
        start = content.start_dir
        tensor = data.index(b"/data/0", start)
    refused = []
    for place in range(start, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            found = read_weights(path).network
        except UserError as error:
            assert str(error).startswith(f"{path} cannot be read as weights")
            refused.append(place)
        else:
            assert found.keys() == expected.keys() and all(map(torch.equal, found.values(), expected.values())), place
    # The attribute that makes a folder of a tensor, 38 bytes after the record's beginning, 46 before its name.
    assert data.rindex(b"PK\x01\x02", 0, tensor) + 38 in refused


@pytest.mark.parametrize("kind, words", [("missing", "does not exist"), ("folder", "is a folder")])
def test_no_file(tmp_path, kind, words):
    path = tmp_path / "w.pt"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=f"expected a weights file, .*{words}"):
        read_weights(path)


# ---------------------------------------------------------------------------------------------------- run folders
def test_description_comes_from_the_run(images, tmp_path):
    from tests.training.helpers import base_flags, run

    outcome = run(base_flags(images, tmp_path) | {"model.not_original": 1, "model.add_normalization": 1})
    trained = load_trained(outcome.folder, NetworkDescription())
    assert trained.description["arch"] == "convnext_micro" and trained.description["not_original"] is True
    assert trained.description["num_classes"] == 4 and not trained.model.training
    assert torch.equal(trained.model.state_dict()["normalize.mean"], outcome.weights["normalize.mean"])
    with pytest.raises(UserError, match="not_original=0"):
        load_trained(outcome.folder, NetworkDescription(not_original=False))
    with pytest.raises(UserError, match="weights_<epoch>"):
        load_trained(tmp_path, NetworkDescription())


def test_run_that_says_something_else(tmp_path):
    torch.save(micro().state_dict(), tmp_path / "weights_1.pt")
    (tmp_path / "params.json").write_text(json.dumps({"model": {"arch": "vit_micro", "num_classes": 1000}}))
    with pytest.raises(UserError) as error:
        load_trained(tmp_path, NetworkDescription())
    for words in ("it is convnext_micro with ConvStem and 4 classes", "arch=vit_micro", "params.json"):
        assert words in str(error.value)
    trained = load_trained(tmp_path, NetworkDescription(arch="convnext_micro", num_classes=4))
    assert trained.description["arch"] == "convnext_micro"  # flags come first


def test_bare_file_describes_itself(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(normalize_model(micro()).state_dict(), path)
    trained = load_trained(path, NetworkDescription())
    assert trained.description == {
        "arch": "convnext_micro",
        "not_original": True,
        "add_normalization": True,
        "updated": False,
        "num_classes": 4,
        "use_blurpool": False,
    }
    torch.save(micro().state_dict(), path)
    assert load_trained(path, NetworkDescription()).description["add_normalization"] is False
    assert load_trained(path, NetworkDescription(add_normalization=True)).description["add_normalization"] is True


# -------------------------------------------------------------------------------------------------- RobustBench
SINGH = {  # RobustBench's name → this project's, size of the image to compare at
    "convnext_t_cvst": ("convnext_tiny", 64),
    "convnext_s_cvst": ("convnext_small", 64),
    "convnext_b_cvst": ("convnext_base", 64),
    "convnext_l_cvst": ("convnext_large", 64),
    "vit_s_cvst": ("deit_s", 224),
    "vit_b_cvst": ("vit_b", 224),
}


@pytest.fixture
def convstem_models(monkeypatch):
    """RobustBench's function of that name; its package imports AutoAttack under another name than PyPI's."""
    for package in ("robustbench", "pyautoattack"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if importlib.util.find_spec("autoattack") is None:
        for module in ("", ".state"):
            monkeypatch.setitem(sys.modules, f"autoattack{module}", importlib.import_module(f"pyautoattack{module}"))
    return importlib.import_module("robustbench.model_zoo.architectures.convstem_models").get_convstem_models


@torch.no_grad()
def randomize(model):
    """Weights of which each has a say in the logits; initial ones switch ConvNeXt's blocks off (layer scale 1e-6)."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))


def largest_difference(modelname, get_convstem_models, size):
    """Compare logits in both directions: their weights through `load_weights`, this project's through `load_state_dict`."""
    arch, _ = SINGH[modelname]
    normalized = modelname == "vit_s_cvst"
    with no_values():  # every number is written below, so time for initial ones is saved
        ours = get_new_model(arch, not_original=True).double()
        theirs = get_convstem_models(modelname).double()
    ours, theirs = ours.to_empty(device="cpu").eval(), theirs.to_empty(device="cpu").eval()
    if normalized:
        ours = normalize_model(ours).double()
        theirs.normalize.load_state_dict({"mean": THREE.double() * 0.9, "std": THREE.double() / 2})
    randomize(theirs)
    weights = parse_weights(theirs.state_dict(), source=modelname)
    found = describe_weights(weights, arch)
    assert arch == found.arch and found.not_original and found.add_normalization is normalized
    load_weights(ours, weights, source=modelname)
    x = torch.rand(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first, there = theirs(x), ours(x)
        for parameter in ours.parameters():
            parameter.mul_(0.9)
        theirs.load_state_dict(ours.state_dict())
        second, back = theirs(x), ours(x)
    assert first.std() > 0.01 and second.std() > 0.01 and not torch.allclose(first, second)
    return max((there - first).abs().max().item(), (back - second).abs().max().item())


@pytest.mark.filterwarnings("ignore")  # RobustBench's, about old names in timm and pkg_resources
@pytest.mark.parametrize(
    "modelname",
    [
        pytest.param(
            name, marks=pytest.mark.large if name in ("convnext_b_cvst", "convnext_l_cvst", "vit_b_cvst") else ()
        )
        for name in SINGH
    ],
)
def test_robustbench_and_ours_load_each_other(modelname, convstem_models):
    assert largest_difference(modelname, convstem_models, SINGH[modelname][1]) < 1e-6
