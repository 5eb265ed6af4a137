"""Files as other projects write them: each gives the logits of the network that it was made from."""

from __future__ import annotations

import argparse
import collections
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from common.errors import UserError
from utils_architecture import IMAGENET_MEAN, IMAGENET_STD, normalize_model
from zoo.description import NetworkDescription
from zoo.inference import describe_weights
from zoo.loading import read_weights
from zoo.meansparse import MeanSparse
from zoo.reading import Foreign, _Unpickler, modules_state
from zoo.runs import load_trained

State = dict[str, torch.Tensor]
NAMESPACE = argparse.Namespace(model="x", lr=0.1, data=Path("/data/imagenet"))


def network(name: str = "resnet10t", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=options.pop("num_classes", 5), **options)
    for name, value in model.named_buffers():
        if "running" in name:  # statistics that are not those of a new network
            value.add_(torch.rand_like(value) / 10)
    return model.eval()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def zeros(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def logits_of(path: Path, arch: str, size: int = 64, **asked: Any) -> torch.Tensor:
    model = load_trained(path, NetworkDescription(arch=arch, **asked)).model.double()
    return model(images(size))


def images(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(found: torch.Tensor, model: nn.Module, size: int = 64) -> bool:
    return torch.allclose(found, model.double()(images(size)), rtol=0, atol=1e-6)


def timm_checkpoint(model: nn.Module) -> Any:
    state = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rest = {"optimizer": optimizer.state_dict(), "args": NAMESPACE, "amp_scaler": {"scale": 65536.0}, "metric": 71.2}
    return {"epoch": 7, "arch": "x", "state_dict": zeros(state), "state_dict_ema": state, "version": 2, **rest}


def arrays(state: State) -> dict[str, np.ndarray]:
    """As NumPy holds them, matrices by their columns."""
    return {name: np.array(value.numpy(), order="F") for name, value in state.items()}


LAYOUTS: dict[str, Callable[[nn.Module], Any]] = {
    "timm's training state": timm_checkpoint,
    "MAE": lambda m: {"model": m.state_dict(), "optimizer": {}, "epoch": 3, "scaler": {}, "args": NAMESPACE},
    "NumPy scalars": lambda m: {"state_dict": m.state_dict(), "best_acc1": np.float64(71.5), "epoch": np.int64(3)},
    "net": lambda m: {"net": prefixed(m.state_dict(), "module."), "acc": 71.0, "epoch": 3},
    "params": lambda m: {"params": m.state_dict(), "step": torch.tensor(3)},
    "model_state": lambda m: {"run": {"model_state": m.state_dict()}, "statistics": {"loss": torch.rand(3)}},
    "any prefix": lambda m: prefixed(m.state_dict(), "student.backbone."),
    "Lightning": lambda m: {
        "state_dict": prefixed(m.state_dict(), "model."),
        "optimizer_states": [{}],
        "hparams": NAMESPACE,
    },
    "average under another name": lambda m: {"model": zeros(m.state_dict()), "ema_model": m.state_dict()},
    "mapping of another program": lambda m: {"model": collections.UserDict(a=1), "net": m.state_dict()},
    "defaultdict": lambda m: {"net": collections.defaultdict(int, m.state_dict())},
    "whole module": lambda m: m,
    "whole module in a state": lambda m: {"model": nn.DataParallel(m), "epoch": 3},
    "NumPy arrays": lambda m: {"net": arrays(m.state_dict()), "args": NAMESPACE, "curve": np.zeros((3, 3))},
    "NumPy arrays beside": lambda m: {"net": m.state_dict(), "more": {"confusion": np.zeros((3, 3))}},
    "arguments beside the tensors": lambda m: {**m.state_dict(), "args": NAMESPACE},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path: Path, layout: str, old: bool) -> None:
    model, path = network(), tmp_path / "w.pth"
    torch.save(LAYOUTS[layout](model), path, _use_new_zipfile_serialization=not old)
    assert same(logits_of(path, "timm_resnet10t"), model)


def sequential(model: nn.Module) -> State:
    inner = normalize_model(model, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)).state_dict()
    return {re.sub("^normalize.", "0.", re.sub("^model.", "1.", name)): value for name, value in inner.items()}


def madry(model: nn.Module) -> Any:
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    state = {"normalizer.new_mean": mean, "normalizer.new_std": std, **prefixed(model.state_dict(), "model.")}
    state |= {"attacker.normalize.new_mean": mean, "attacker.normalize.new_std": std}
    state |= prefixed(model.state_dict(), "attacker.model.")
    return {"model": prefixed(state, "module."), "optimizer": {}, "schedule": {}, "epoch": 90, "args": NAMESPACE}


@pytest.mark.parametrize("layout", [sequential, madry])
def test_normaliser_inside(tmp_path: Path, layout: Callable[[nn.Module], Any]) -> None:
    model, path = network(), tmp_path / "w.ckpt"
    torch.save(layout(model), path)
    assert same(logits_of(path, "timm_resnet10t"), normalize_model(model, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)))


class Attributes(nn.Module):
    """A normaliser as many write it."""

    def __init__(self, mean: Any, std: Any, names: tuple[str, str] = ("mean", "std")) -> None:
        super().__init__()
        vars(self).update(zip(names, (mean, std)))


@pytest.mark.parametrize(
    "normaliser",
    [
        lambda mean, std: Attributes(mean, std),
        lambda mean, std: Attributes(tuple(mean), tuple(std), ("mu", "sigma")),
        lambda mean, std: Attributes(torch.tensor(mean), torch.tensor(std)[:, None, None]),
        lambda mean, std: torchvision.transforms.Normalize(mean, std),
    ],
)
def test_whole_module_behind_a_normaliser_without_buffers(tmp_path: Path, normaliser: Callable[..., Any]) -> None:
    model, path, statistics = network(), tmp_path / "w.pth", ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    torch.save(nn.Sequential(normaliser(*statistics), model), path)
    assert same(logits_of(path, "timm_resnet10t"), normalize_model(model, *statistics))
    torch.save(nn.Sequential(normaliser(*statistics), nn.DataParallel(model)), path)
    assert same(logits_of(path, "timm_resnet10t"), normalize_model(model, *statistics))


@pytest.mark.parametrize("values", [(0.5, 0.02), ([0.5], [0.5]), ("abc", "abc"), ([10**400] * 3, [1, 1, 1])])
def test_other_attributes_are_no_normaliser(tmp_path: Path, values: tuple[Any, Any]) -> None:
    model, path = network(), tmp_path / "w.pth"
    torch.save(nn.Sequential(Attributes(*values), model), path)
    assert same(logits_of(path, "timm_resnet10t"), model)


def test_half_precision(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "w.pth"
    torch.save(model.half().state_dict(), path)
    assert same(logits_of(path, "timm_resnet10t"), model)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old torch"])
@pytest.mark.parametrize("rest", [{"args": NAMESPACE}, {}], ids=["objects", "tensors alone"])
@pytest.mark.parametrize("dtype", ["float8_e5m2", "uint16", "complex64", "bool", "bfloat16", "int8", "float64"])
def test_every_type_of_number(tmp_path: Path, dtype: str, rest: dict, old: bool) -> None:
    path, values = tmp_path / "w.pth", torch.rand(4, 4).mul(9).to(getattr(torch, dtype))
    content = {**rest, "net": {"w": values.t()[1:], "none": values[:0]}}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    found = read_weights(path).network
    assert found["w"].dtype == values.dtype and found["none"].shape == (0, 4)
    assert torch.equal(found["w"].cfloat(), values.t()[1:].cfloat())


def test_swin_of_earlier_timm(tmp_path: Path) -> None:
    """Down-sampling stood at a stage's end, the head was bare, and two kinds of buffers were saved."""
    name = "swin_tiny_patch4_window7_224"
    model, path, old = network(name), tmp_path / "w.pth", {}
    for key, value in model.state_dict().items():
        key = re.sub(r"layers.(\d).downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        old[key.replace("head.fc.", "head.")] = value
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    torch.save({"state_dict": old}, path)
    assert same(logits_of(path, f"timm_{name}", 224), model, 224)


@pytest.mark.parametrize("size", [224, 336])
def test_vit_that_reads_the_mean(tmp_path: Path, size: int) -> None:
    name = "vit_tiny_patch16_224"
    model, path = network(name, global_pool="avg", img_size=size), tmp_path / "w.pth"
    assert "fc_norm.weight" in model.state_dict() and "norm.weight" not in model.state_dict()
    torch.save(model.state_dict(), path)
    # At another size than the network's own, both interpolate.
    assert same(
        logits_of(path, f"timm_{name}", 224),
        network(name, global_pool="avg", img_size=size, dynamic_img_size=True),
        224,
    )


def test_xcit(tmp_path: Path) -> None:
    name = "xcit_nano_12_p16_224"
    model, path = network(name), tmp_path / "w.pth"
    torch.save({"model": model.state_dict(), "args": NAMESPACE}, path)
    assert same(logits_of(path, f"timm_{name}", 224), model, 224)


class Published(nn.Module):
    """The operator as its authors write it for ConvNeXt."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.register_buffer("momentum", torch.tensor(0.1))
        self.register_buffer("running_mean", torch.randn(planes) / 10)
        self.register_buffer("running_var", torch.rand(planes))
        self.register_buffer("threshold", torch.tensor(0.2))
        self.register_buffer("flag_update_statistics", torch.tensor(0))
        self.register_buffer("batch_num", torch.tensor(9.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, 1, 1) if x.shape[1] == len(self.running_mean) else (1, 1, 1, -1)
        bias, crop = self.running_mean.view(shape), self.threshold * self.running_var.sqrt().view(shape)
        return torch.where((x - bias).abs() < crop, bias * torch.ones_like(x), x)


def test_mean_sparse(tmp_path: Path) -> None:
    name, plain = "convnext_tiny", network("convnext_tiny")
    model, path = network("convnext_tiny"), tmp_path / "w.pth"
    for block in (block for stage in model.stages for block in stage.blocks):
        planes = block.conv_dw.out_channels
        block.drop_path = nn.Sequential(block.drop_path, Published(planes))
        block.mlp.act = nn.Sequential(Published(4 * planes), block.mlp.act)
    torch.save({"state_dict": prefixed(model.state_dict(), "module.")}, path)
    trained = load_trained(path, NetworkDescription(arch=f"timm_{name}"))
    assert sum(isinstance(module, MeanSparse) for module in trained.model.modules()) == 36
    found = trained.model.double()(images(64))
    assert same(found, model) and not same(found, plain)


@pytest.mark.parametrize(
    "at, changed, words",
    [
        ("nowhere.1", {}, "there is no layer 'nowhere'"),
        (".1", {}, "there is no layer ''"),
        ("act1.1", {"threshold": torch.ones(2)}, "act1.1.threshold is unexpected"),
        ("act1.1", {"running_mean": torch.tensor(1.0)}, "act1.1.threshold is unexpected"),
        ("act1.1", {"a.b": torch.tensor(1.0)}, "act1.1.threshold is unexpected"),
    ],
)
def test_operators_that_fit_nowhere(tmp_path: Path, at: str, changed: State, words: str) -> None:
    buffers = {name: value for name, value in Published(64).state_dict().items() if "flag" not in name} | changed
    torch.save(network().state_dict() | prefixed(buffers, f"{at}."), path := tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        load_trained(path, NetworkDescription(arch="timm_resnet10t"))


def test_nothing_of_a_file_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return eval, (f"open({str(tmp_path / 'evil')!r}, 'w')",)

    path = tmp_path / "w.pth"
    for old in (False, True):
        torch.save({"state_dict": network().state_dict(), "hook": Evil()}, path, _use_new_zipfile_serialization=not old)
        assert read_weights(path).key == "state_dict"
    assert not (tmp_path / "evil").exists()


def test_two_copies_are_not_chosen_from(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"std_model": network().state_dict(), "rob_model": network().state_dict(), "args": NAMESPACE}, path)
    with pytest.raises(UserError, match="expected one model, found 2: std_model, rob_model"):
        read_weights(path)
    trained = load_trained(path, NetworkDescription(weights_key="rob_model"))
    assert trained.description["weights_key"] == "rob_model" and read_weights(path, key="rob_model").key == "rob_model"


@pytest.mark.parametrize("name", ["densenet161", "swin_small_patch4_window7_224"])
def test_architectures_of_timm_are_found_by_their_shapes(tmp_path: Path, name: str) -> None:
    state = network(name).state_dict()
    path = tmp_path / "w.pth"
    torch.save({"state_dict": prefixed(state, "module."), "args": NAMESPACE}, path)
    found = describe_weights(read_weights(path))
    assert found.arch == f"timm_{name}" and found.num_classes == 5 and not found.add_normalization


@pytest.mark.parametrize("name", ["mnasnet1_0", "mobilenet_v2", "shufflenet_v2_x1_0", "vgg16_bn", "vgg11"])
def test_architectures_of_torchvision_are_found_by_their_shapes(tmp_path: Path, name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    path = tmp_path / "w.pth"
    torch.save(prefixed(model.state_dict(), "module.model."), path)
    trained = load_trained(path, NetworkDescription())
    assert trained.description["arch"] == f"torchvision_{name}" and trained.description["num_classes"] == 5
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trained.model(x), model(x))


def test_names_of_facebooks_convnext(tmp_path: Path) -> None:
    """As its repository publishes them: other names for everything but the values."""
    model = network("convnext_atto", num_classes=7)
    renames = [(r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.")]
    renames += [(r"\.blocks\.", "."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"^head\.norm", "norm")]
    state = {}
    for name, value in model.state_dict().items():
        for pattern, there in [*renames, (r"^head\.fc", "head")]:
            name = re.sub(pattern, there, name)
        state[name] = value
    assert {"downsample_layers.1.1.weight", "stages.0.0.pwconv1.bias", "norm.weight", "head.bias"} <= state.keys()
    path = tmp_path / "convnext.pth"
    torch.save({"model": state}, path)
    trained = load_trained(path, NetworkDescription(arch="timm_convnext_atto"))
    assert trained.description["num_classes"] == 7
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trained.model(x), model.eval()(x))


def test_image_tower_of_a_clip_model_is_told(tmp_path: Path) -> None:
    path = tmp_path / "fare_eps_2.pt"
    torch.save(
        {"class_embedding": torch.rand(8), "positional_embedding": torch.rand(5, 8), "proj": torch.rand(8, 4)}, path
    )
    with pytest.raises(UserError, match="does not fit.*image tower of a CLIP model: see `python -m zoo zero-shot`"):
        load_trained(path, NetworkDescription())


def test_several_architectures_of_timm_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their activations differ, of which weights show nothing."""
    few = {"vgg": ["vgg11", "vgg13"], "deit": []}
    few["vision_transformer"] = [
        "vit_base_patch32_clip_224",
        "vit_base_patch32_clip_quickgelu_224",
        "vit_tiny_patch16_224",
    ]
    monkeypatch.setattr("timm.list_models", lambda module: few[module])
    path = tmp_path / "w.pth"
    torch.save(network("vgg11", num_classes=3).state_dict(), path)
    trained = load_trained(path, NetworkDescription())
    assert trained.description["arch"] == "timm_vgg11" and trained.description["num_classes"] == 3
    torch.save(network("vit_base_patch32_clip_224", img_size=32, num_classes=3).state_dict(), path)
    with pytest.raises(UserError, match="vit_base_patch32_clip_.*which have the same weights .*give arch"):
        load_trained(path, NetworkDescription())


# --- what a file must not lead to -------------------------------------------------------------------------------------


def refusal(content: Any, path: Path) -> str:
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        read_weights(path)
    return str(error.value)


def test_a_larger_teacher_is_not_taken_for_the_network(tmp_path: Path) -> None:
    content = {"student": network("resnet10t").state_dict(), "teacher": network("resnet14t").state_dict(), "epoch": 3}
    assert "expected one model, found 2: student, teacher" in refusal(content, tmp_path / "w.pth")


def test_an_average_is_taken_however_large_the_rest(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", network().state_dict()
    torch.save({**madry(network()), "modelEMA": state, "optimal": {"loss": torch.rand(3)}}, path)
    assert read_weights(path).key == "modelEMA"


def test_a_normaliser_beside_the_state_dict(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "w.pth"
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    torch.save({"mean": mean, "std": std, "state_dict": model.state_dict()}, path)
    assert same(logits_of(path, "timm_resnet10t"), normalize_model(model, mean.tolist(), std.tolist()))


def test_wrappers_inside_of_names_and_counters_do_not_matter(tmp_path: Path) -> None:
    model, path, state = network(), tmp_path / "w.pth", {}
    for name, value in model.state_dict().items():
        if "num_batches_tracked" not in name:
            state[name.replace("layer1.", "layer1._orig_mod.").replace("layer2.", "layer2._fsdp_wrapped_module.")] = (
                value
            )
    state["bn1.num_batches_tracked"] = torch.tensor(3.5)  # averaged with the rest
    torch.save(state, path)
    assert same(logits_of(path, "timm_resnet10t"), model)


def test_networks_of_other_heads_are_not_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"swin_transformer_v2": ["swinv2_tiny_window8_256", "swinv2_tiny_window16_256"]}
    monkeypatch.setattr("timm.list_models", lambda module: few[module])
    path = tmp_path / "w.pth"
    torch.save(network("swinv2_tiny_window16_256").state_dict(), path)
    with pytest.raises(UserError, match="window8_256 and timm_swinv2_tiny_window16_256, which have the same weights"):
        load_trained(path, NetworkDescription())


def test_cycles_and_many_copies_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {"weight": torch.rand(2, 2)}
    for _ in range(40):
        content = {"a": content, "b": content}
    cycle: dict[str, Any] = {"args": NAMESPACE}
    cycle["again"] = cycle
    assert "no state dict" in refusal(cycle, tmp_path / "w.pth")
    assert "no state dict" in refusal(
        content | {"args": NAMESPACE}, tmp_path / "w.pth"
    )  # deeper than anyone keeps weights


def test_modules_in_modules_end() -> None:
    content = Foreign()
    content.__setstate__({"_modules": {}, "_parameters": {"weight": torch.rand(2, 2)}})
    assert list(modules_state(content)) == ["weight"]
    for _ in range(5000):
        inner, content = content, Foreign()
        content.__setstate__({"_modules": {"a": inner}})
    assert modules_state(content) == {}


def unpickled(opcodes: bytes, size: int = 16) -> Any:
    """What a pickle becomes that may ask for one storage, of `size` bytes."""
    return _Unpickler(io.BytesIO(b"\x80\x02" + opcodes + b"."), lambda *_: np.zeros(size, np.uint8)).load()


STORAGE = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"


def test_a_file_changes_nothing_for_the_next_one() -> None:
    """Not even defaults of the functions that files may name, nor the classes and types that they get."""
    state = b"}U\x0c__defaults__(K\x01ts"
    for name in ("_utils\n_rebuild_tensor_v2", "_utils\n_rebuild_parameter", "_tensor\n_rebuild_from_type_v2"):
        with pytest.raises(pickle.UnpicklingError, match="a state for a function"):
            unpickled(f"ctorch.{name}\n".encode() + state + b"b")
    before = dict(vars(Foreign))
    for name in ("torch\nfloat32", "torch\nFloatStorage", "torch\nSize", "collections\nOrderedDict", "os\nsystem"):
        for attributes in (state, b"N" + state + b"\x86"):  # through __dict__, and through setattr
            with pytest.raises((TypeError, AttributeError)):
                unpickled(f"c{name}\n".encode() + attributes + b"b")
    assert vars(Foreign) == before


def test_no_more_memory_than_the_file_has() -> None:
    with pytest.raises(pickle.UnpicklingError, match="memo entry"):
        unpickled(b"}r" + (2**31 - 1).to_bytes(4, "little"))
    assert unpickled(STORAGE).tolist() == [0.0] * 4
    for view in (b"K\x00(K\x05t(K\x01t", b"K\x00(J\xff\xff\xff\x7ft(J\xff\xff\xff\x7ft", b"K\x04(K\x01t(K\x01t"):
        with pytest.raises(RuntimeError, match="[sS]torage"):
            unpickled(b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + view + b"tR")
        with pytest.raises(RuntimeError, match="not resizable|overflowed"):
            unpickled(STORAGE + b"(" + STORAGE + view + b"tb")  # Tensor.__setstate__, which calls set_()


def test_arrays_hold_bytes_of_their_own_and_plain_numbers(tmp_path: Path) -> None:
    """`values` of another type would be memory that a number asks for, or more than is there."""
    kind = b"cnumpy\ndtype\n(U\x02f4tR(K\x03U\x01<tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(K\x02t%sK\x00%stb"
    eight = b"c_codecs\nencode\n(X\x08\x00\x00\x00" + bytes(8) + b"U\x06latin1tR"
    assert unpickled(array % (kind, eight)).tensor.tolist() == [0.0, 0.0]
    objects = kind.replace(b"f4", b"O8").replace(b"<", b"|")
    for other in (array % (kind, b"J\xff\xff\xff\x7f"), array % (objects, eight), array % (b"U\x03<f4", eight)):
        assert unpickled(other).tensor is None
    with pytest.raises(TypeError, match="too small"):
        unpickled(array.replace(b"(K\x02t", b"(J\xff\xff\xff\x7ft") % (kind, eight))
    with pytest.raises(TypeError):
        unpickled(b"c_codecs\nencode\n(K\x01U\x06latin1tR")


def test_storages_of_old_torch_are_those_of_the_file(tmp_path: Path) -> None:
    """All of them, each as large as its tensors: no tensor is of what was in memory."""
    path = tmp_path / "w.pth"
    torch.save({"args": NAMESPACE, "w": torch.ones(6, 50)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    values, keys = 6 * 50 * 4 + 8, data.rindex(b"\x80\x02]")
    broken = {
        "cut": data[:-1],
        "no keys": data[:keys] + pickle.dumps([], protocol=2),
        "another size": data[:-values] + (299).to_bytes(8, "little") + data[8 - values :],
    }
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as weights"):
            read_weights(path)


@pytest.mark.parametrize("extra", ["long name", "other name"])
def test_torchscript_that_is_called_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    """torch's reader of archives cuts names and does not know of second ones: it sees constants.pkl where zipfile does not."""
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("a program was loaded"))
    path, root = tmp_path / "w.pth", "a" * 497
    torch.save({"args": NAMESPACE, "w": torch.ones(2, 2)}, path)
    with zipfile.ZipFile(path) as source:
        records = {f"{root}/{name.partition('/')[2]}": source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
        constants = zipfile.ZipInfo(f"{root}/constants.pkl" + ("XXXX" if extra == "long name" else ""))
        if extra == "other name":
            second = b"\x01" + zlib.crc32(constants.filename.encode()).to_bytes(4, "little") + f"{root}/x".encode()
            constants.extra = struct.pack("<HH", 0x7075, len(second)) + second
        archive.writestr(constants, b"")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(path)


@pytest.mark.parametrize(
    ("name", "size", "arch"), [("vit_tiny_patch16_224", 384, None), ("vit_tiny_patch16_224", 64, None)]
)
def test_vit_of_another_resolution_is_exact_at_its_own(tmp_path: Path, name: str, size: int, arch: str | None) -> None:
    """Position embeddings that are resampled to the usual grid and back would not be the same."""
    model = network(name, img_size=size)
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn_like(model.pos_embed))
    path = tmp_path / "vit.pth"
    torch.save(model.state_dict(), path)
    trained = load_trained(path, NetworkDescription(arch=f"timm_{name}"))
    assert trained.preprocessing.img_size == size
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(trained.model(x), model(x), atol=1e-6)
        assert trained.model(torch.rand(1, 3, 224, 224)).shape == (1, 5)


class Kept(nn.Module):
    """A normaliser that keeps its statistics in the way that `keep` says."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        for name, value in (("mean", mean), ("std", std)):
            if keep == "buffer":
                self.register_buffer(name, torch.tensor(value), persistent=False)
            else:
                setattr(self, f"_{name}" if keep == "list" else name, value.tolist() if keep == "list" else value)


@pytest.mark.parametrize("keep", ["buffer", "array", "list"])
def test_normalisers_of_whole_modules(tmp_path: Path, keep: str) -> None:
    path = tmp_path / "whole.pth"
    torch.save(nn.Sequential(Kept(keep), network()), path)
    weights = read_weights(path)
    assert weights.normalizer["std"].flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_normaliser_beside_the_network(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": network().state_dict(), "mean": kind([0.5] * 3), "std": kind([0.25] * 3)}, path)
    assert read_weights(path).normalizer["std"].flatten().tolist() == [0.25] * 3


def test_network_beside_other_things_in_one_mapping(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", network().state_dict()
    torch.save({**state, "history": [1, 2], "optimizer": {"state": {0: torch.rand(3)}}}, path)
    assert read_weights(path).network.keys() == state.keys()
    torch.save({**state, "teacher": {name: value * 0 for name, value in state.items()}}, path)
    with pytest.raises(UserError, match="expected one model, found 2: the file itself, teacher"):
        read_weights(path)
    torch.save({**prefixed(state, "encoder_q."), **prefixed(state, "encoder_k."), "queue": torch.rand(4, 4)}, path)
    assert read_weights(path, key="encoder_k").network.keys() == state.keys()


@pytest.mark.parametrize("given", [{}, {"img_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}])
def test_arguments_of_timms_training_script_are_honoured(tmp_path: Path, given: dict[str, Any]) -> None:
    options = {"model": "resnet10t", "mean": None, "std": None, "crop_pct": None, "img_size": None, "interpolation": ""}
    path, model = tmp_path / "model_best.pth.tar", network()
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(**options | given)}, path)
    trained = load_trained(path, NetworkDescription())
    mean, std = (0.5, 0.25) if given else (torch.tensor(pair).view(3, 1, 1) for pair in (IMAGENET_MEAN, IMAGENET_STD))
    assert trained.notes == () and trained.preprocessing.source == "timm's arguments in the file"
    assert (trained.preprocessing.img_size, trained.preprocessing.crop_pct) == ((64, 1.0) if given else (176, 0.875))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(trained.model(x), model((x - mean) / std), atol=1e-5)
    assert load_trained(path, NetworkDescription(add_normalization=False)).description["add_normalization"] is False


def test_normaliser_that_is_asked_for(tmp_path: Path) -> None:
    path, model = tmp_path / "w.pth", network()
    torch.save(model.state_dict(), path)
    trained = load_trained(path, NetworkDescription(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    assert trained.description["mean"] == (0.5, 0.5, 0.5) and trained.notes == ()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(trained.model(x), model((x - 0.5) / 0.25), atol=1e-5)
    with pytest.raises(UserError, match="mean, std: expected both"):
        load_trained(path, NetworkDescription(mean=(0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match="mean and std would have no effect, because add_normalization=0 requests none"):
        load_trained(path, NetworkDescription(mean=(0.5,) * 3, std=(0.5,) * 3, add_normalization=False))
    torch.save(normalize_model(model).state_dict(), path)
    with pytest.raises(UserError, match="would have no effect, because the file has a normaliser"):
        load_trained(path, NetworkDescription(mean=(0.5,) * 3, std=(0.5,) * 3))


@pytest.mark.parametrize("cfg", [{"std": list(IMAGENET_STD), "input_size": [3, 64, 64]}, {"mean": list(IMAGENET_MEAN)}])
def test_what_a_configuration_of_the_hub_leaves_out_is_timms_default(tmp_path: Path, cfg: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": cfg}))
    model = network()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    trained = load_trained(tmp_path, NetworkDescription())
    assert trained.preprocessing.img_size == (64 if "input_size" in cfg else 224)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(trained.model(x), normalize_model(model)(x), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": [3, 64, 96]}, "expected square images"),
        ({"input_size": "64"}, "expected square images"),
        ({"crop_pct": 2}, "a crop_pct in .0, 1."),
        ({"mean": [0.5]}, "mean and std of three numbers"),
        ({"std": None}, "mean and std of three numbers"),
        ({"mean": "imagenet"}, "mean and std of three numbers"),
        ({"model_args": {"act_layer": "gelu"}}, "got the options"),
        ({"global_pool": "max"}, "got the options"),
    ],
)
def test_odd_configurations_of_the_hub_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    cfg = {"input_size": [3, 64, 64], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    top = {key: change.pop(key) for key in ("model_args", "global_pool") if key in change}
    content = {"architecture": "resnet10t", "pretrained_cfg": cfg | change, **top}
    (tmp_path / "config.json").write_text(json.dumps(content))
    torch.save(network().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=words):
        load_trained(tmp_path, NetworkDescription())
