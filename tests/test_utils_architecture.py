"""The models compared with golden names, shapes and logits of the published code, and with definitions.

Golden files (`tests/golden/`): `state_dicts.json` maps `<arch>/not_original=<0|1>` to the number of parameters and the
shape of every tensor; `logits.npz` has the logits of filled models (see `filled`) in float64.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from timm.layers import LayerNorm2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from utils_architecture import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConvStem,
    get_new_model,
    normalize_model,
)
from zoo.models import add_blurpool

GOLDEN = Path(__file__).parent / "golden"
STATE_DICTS = json.loads((GOLDEN / "state_dicts.json").read_text())
LOGITS = dict(np.load(GOLDEN / "logits.npz"))

PUBLISHED_PARAMETERS = {  # with ConvStem
    "convnext_tiny": 28_627_432,
    "convnext_small": 50_261_992,
    "convnext_base": 88_753_416,
    "convnext_large": 198_134_680,
    "convnext_iso": 23_035_624,
    "vit_s": 22_777_576,
    "deit_s": 22_777_576,
    "vit_m": 39_527_272,
    "vit_b": 87_147_112,
}
WITH_STEM = [name for name, architecture in ARCHITECTURES.items() if architecture.conv_stem]
MICRO = ["convnext_micro", "convnext_iso_micro", "vit_micro"]
VITS = ["vit_s", "vit_m", "vit_micro"]  # position embedding with class token, without, small


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build models on the meta device: with names and shapes but no numbers, so that large ones cost nothing."""
    # timm reads the numbers of a linspace while building (drop path rates).
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        yield


def split_key(key: str) -> tuple[str, bool]:
    name, flag = key.split("/not_original=")
    return name, flag == "1"


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the state dict of the golden logits: a function of name order and shape, float64."""
    state = {}
    for i, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        j = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        w = torch.sin(0.7 * j + 0.13 * i + 0.31 * (j % 97))
        if len(shape) >= 2:
            w = w * (2 / (j.numel() // shape[0])) ** 0.5
        elif name.endswith("weight") or "gamma" in name:
            w = 1 + 0.05 * w
        else:
            w = 0.05 * w
        state[name] = w.reshape(shape)
    return state


def speed_up_depthwise(model: nn.Module) -> None:
    """Compute depthwise convolutions as a sum of shifted images: in float64 PyTorch's take 40 times as long."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels:
            assert conv.stride == conv.dilation == (1, 1)
            conv.forward = functools.partial(depthwise, conv)


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    padded = F.pad(x, [conv.padding[1]] * 2 + [conv.padding[0]] * 2)
    height, width = (padded.shape[2 + i] - conv.kernel_size[i] + 1 for i in range(2))
    out = conv.bias.view(1, -1, 1, 1).repeat(len(x), 1, height, width)
    for dy, dx in np.ndindex(*conv.kernel_size):
        out.addcmul_(padded[:, :, dy : dy + height, dx : dx + width], conv.weight[:, :, dy, dx].view(1, -1, 1, 1))
    return out


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# ----------------------------------------------------------------------------------------------- golden files
def test_golden_files_are_complete() -> None:
    assert len(STATE_DICTS) == 18
    assert len(LOGITS) == 14
    assert LOGITS.keys() <= STATE_DICTS.keys()


@pytest.mark.parametrize("key", STATE_DICTS)
@pytest.mark.usefixtures("meta")
def test_state_dict_is_the_published_one(key: str) -> None:
    name, not_original = split_key(key)
    model = get_new_model(name, not_original=not_original)
    assert shapes(model) == STATE_DICTS[key]["state_dict"]
    assert count(model) == STATE_DICTS[key]["parameters"]


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
@pytest.mark.usefixtures("meta")
def test_parameters_with_conv_stem(name: str, parameters: int) -> None:
    assert count(get_new_model(name, not_original=True)) == parameters


def large(key: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.large] if STATE_DICTS[key]["parameters"] > 45e6 else []


@pytest.mark.parametrize("key", [pytest.param(key, marks=large(key)) for key in LOGITS])
def test_logits_are_the_published_ones(key: str, request: pytest.FixtureRequest) -> None:
    name, not_original = split_key(key)
    images = 2 if STATE_DICTS[key]["parameters"] < 30e6 else 1  # only the first image of a large model, to save time
    state = filled(STATE_DICTS[key]["state_dict"])
    x = 0.5 + 0.5 * torch.sin(0.0137 * torch.arange(2 * 3 * 224 * 224, dtype=torch.float64))
    request.getfixturevalue("meta")
    model = get_new_model(name, not_original=not_original).eval()
    model.load_state_dict(state, assign=True)
    speed_up_depthwise(model)
    with torch.no_grad():
        logits = model(x.reshape(2, 3, 224, 224)[:images]).numpy()
    expected = LOGITS[key]
    assert np.abs(logits - expected[:images]).max() < 1e-9 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------ table
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("meta")
def test_every_entry_makes_logits_at_its_own_size(name: str) -> None:
    size = ARCHITECTURES[name].img_size
    model = get_new_model(name, num_classes=7).eval()
    assert model(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if entry.pretrained])
def test_published_weights_are_known_to_timm(name: str) -> None:
    builder, _, tag = ARCHITECTURES[name].builder.partition(".")
    cfg = timm.get_pretrained_cfg(f"{builder}.{tag}")
    assert cfg.tag == tag != ""
    assert cfg.has_weights
    assert ("22k" in tag) == name.endswith("_21k")


@pytest.mark.parametrize("name", WITH_STEM)
@pytest.mark.usefixtures("meta")
def test_conv_stem_has_stride_and_width_of_the_patch_stem(name: str) -> None:
    architecture = ARCHITECTURES[name]
    original = get_new_model(name).get_submodule(architecture.conv_stem.at)
    replaced = get_new_model(name, not_original=True).get_submodule(architecture.conv_stem.at)
    patch = next(module for module in original.modules() if isinstance(module, nn.Conv2d))
    assert isinstance(replaced, ConvStem)
    assert patch.kernel_size == patch.stride == (architecture.conv_stem.stride,) * 2
    images = torch.empty(2, 3, architecture.img_size, architecture.img_size)
    assert replaced(images).shape == original(images).shape


@pytest.mark.usefixtures("meta")
def test_updated_isotropic_convnext_has_width_432() -> None:
    published = STATE_DICTS["convnext_iso/not_original=1"]["state_dict"]
    wide = shapes(get_new_model("convnext_iso", not_original=True, updated=True))
    assert wide.keys() == published.keys()
    assert wide["stem.stem.9.weight"] == [384, 192, 3, 3]
    assert wide["stem.stem.12.weight"] == [432, 384, 1, 1]
    assert wide["blocks.17.pwconv1.weight"] == [4 * 432, 432]
    assert wide["head.weight"] == [1000, 432]
    assert shapes(get_new_model("convnext_iso", updated=True))["stem.weight"] == [432, 3, 16, 16]


@pytest.mark.usefixtures("meta")
def test_gelu_resnet_has_no_relu() -> None:
    kinds = {type(module).__name__ for module in get_new_model("resnet50_gelu").modules()}
    assert "GELU" in kinds and "ReLU" not in kinds
    assert "ReLU" in {type(module).__name__ for module in get_new_model("resnet50").modules()}


@pytest.mark.usefixtures("meta")
def test_drop_path_reaches_the_blocks() -> None:
    for name in ["convnext_tiny", "convnext_iso", "vit_s", "convnext_micro", "vit_micro"]:
        rates = [m.drop_prob for m in get_new_model(name, drop_path=0.3).modules() if hasattr(m, "drop_prob")]
        assert max(rates) == rates[-1] == pytest.approx(0.3)
        assert rates == sorted(rates)
        assert not any(getattr(module, "drop_prob", 0) for module in get_new_model(name).modules())


# ----------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("convnext-tiny", "'convnext_tiny'"),
        ("convnext_nano", "'timm_convnext_nano'"),
        ("timm_resnt50", "'timm_resnet50'"),
        ("effnet_b0", "nearest"),
        ("", "nearest"),
    ],
)
def test_unknown_name_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match="^arch: ") as caught:
        get_new_model(name)
    assert repr(name) in str(caught.value)
    assert nearest in str(caught.value)


def test_unknown_tag_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="^arch: .*timm_resnet50.a1_in1k"):
        get_new_model("timm_resnet50.no_such_tag")


@pytest.mark.parametrize("name", ["resnet50", "inception", "timm_test_vit"])
def test_no_conv_stem(name: str) -> None:
    with pytest.raises(UserError, match="^not_original: .*convnext_tiny.*vit_b"):
        get_new_model(name, not_original=True)


def test_no_updated_variant() -> None:
    with pytest.raises(UserError, match="^updated: 'vit_s'.*convnext_iso"):
        get_new_model("vit_s", updated=True)


@pytest.mark.parametrize("name", ["convnext_iso", "resnet50_gelu", "timm_vit_small_resnet50d_s16_224", *MICRO])
def test_no_published_weights(name: str) -> None:
    with pytest.raises(UserError, match="^pretrained: no published weights.*turn it off"):
        get_new_model(name, pretrained=True)


def test_no_stochastic_depth() -> None:
    with pytest.raises(UserError, match="^drop_path: 'inception'"):
        get_new_model("inception", drop_path=0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_out_of_range(rate: float) -> None:
    with pytest.raises(UserError, match="^drop_path: "):
        get_new_model("vit_micro", drop_path=rate)


@pytest.mark.parametrize(("name", "size"), [("vit_micro", 34), ("timm_test_vit", 100)])
def test_patches_must_tile_the_image(name: str, size: int) -> None:
    with pytest.raises(UserError, match=f"multiples of its patch size.*{size}"):
        get_new_model(name, img_size=size)


# ------------------------------------------------------------------------------------------ published weights
def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Empty cache and no network.
    offline = functools.partial(hf_hub_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr("utils_architecture.hf_hub_download", offline)
    with pytest.raises(UserError) as caught:
        get_new_model("vit_s", pretrained=True)
    for part in ["pretrained: ", "augreg_in1k", "'vit_s'", "turn it off", "or a checkpoint"]:
        assert part in str(caught.value)


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Tensor]]:
    """Return a function that stores fresh weights of the given model in place of the hub's."""

    def put(name: str) -> dict[str, Tensor]:
        state = get_new_model(name).state_dict()
        save_file(state, tmp_path / "model.safetensors")
        monkeypatch.setattr("utils_architecture.hf_hub_download", download)
        return state

    def download(repo: str, file: str) -> str:
        assert repo.startswith("timm/") and file == "model.safetensors"
        return str(tmp_path / file)

    return put


def test_pretrained_loads_all(publish: Callable[[str], dict[str, Tensor]]) -> None:
    published = publish("timm_test_vit")
    loaded = get_new_model("timm_test_vit", pretrained=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in published.items())


def test_pretrained_with_other_classes_gets_a_new_head(publish: Callable[[str], dict[str, Tensor]]) -> None:
    published = publish("timm_test_vit")
    loaded = get_new_model("timm_test_vit", pretrained=True, num_classes=10).state_dict()
    assert loaded["head.weight"].shape == (10, published["head.weight"].shape[1])
    rest = [name for name in published if not name.startswith("head.")]
    assert all(torch.equal(loaded[name], published[name]) for name in rest)


def test_conv_stem_replaces_the_pretrained_patch_stem_only(publish: Callable[[str], dict[str, Tensor]]) -> None:
    published = publish("vit_s")
    loaded = get_new_model("vit_s", pretrained=True, not_original=True).state_dict()
    rest = [name for name in published if not name.startswith("patch_embed.")]
    assert all(torch.equal(loaded[name], published[name]) for name in rest)


# ------------------------------------------------------------------------------------------------------ stems
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_stem_norm_is_layer_norm_over_channels(memory_format: torch.memory_format) -> None:
    norm = ConvStem((24,), (2,)).stem[1].double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    x = 1e-3 * pixels(2, 24, 5, 7, dtype=torch.float64).to(memory_format=memory_format)  # small: eps must be right
    mean = x.mean(dim=1, keepdim=True)
    variance = (x - mean).square().mean(dim=1, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-12)


def test_conv_stem_layers() -> None:
    stem = ConvStem((8, 16), (2, 1), out_channels=12).stem
    assert [type(layer) for layer in stem] == [nn.Conv2d, LayerNorm2d, nn.GELU] * 2 + [nn.Conv2d]
    assert [stem[i].stride for i in (0, 3, 6)] == [(2, 2), (1, 1), (1, 1)]
    assert [stem[i].kernel_size for i in (0, 3, 6)] == [(3, 3), (3, 3), (1, 1)]
    assert all(gelu.approximate == "none" for gelu in stem if isinstance(gelu, nn.GELU))


@pytest.mark.parametrize(("channels", "strides"), [((8, 16), (2,)), ((8,), (2, 2))])
def test_conv_stem_needs_a_stride_for_each_convolution(channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        ConvStem(channels, strides)


@pytest.mark.parametrize("name", ["convnext_tiny", *MICRO])
def test_conv_stem_keeps_the_default_initialisation(name: str) -> None:
    torch.manual_seed(0)
    model = get_new_model(name, not_original=True)
    for layer in model.get_submodule(ARCHITECTURES[name].conv_stem.at).modules():
        if isinstance(layer, nn.Conv2d):
            bound = (layer.in_channels * layer.kernel_size[0] ** 2) ** -0.5
            # PyTorch: weight and bias uniform in ±1/sqrt(fan in); timm: normal of deviation 0.02, bias zero.
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert 0 < layer.bias.abs().max() <= bound
        elif isinstance(layer, LayerNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()


def test_isotropic_convnext_initialisation() -> None:
    torch.manual_seed(0)
    model = get_new_model("convnext_iso_micro")
    for layer in [model.stem, model.head, model.blocks[0].dwconv, model.blocks[5].pwconv2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (layer.bias == 0).all()


# ------------------------------------------------------------------------------------------------ image sizes
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("not_original", [True, False])
@pytest.mark.parametrize("name", VITS)
def test_vit_runs_at_other_sizes(name: str, not_original: bool, train: bool) -> None:
    model = get_new_model(name, not_original=not_original, num_classes=5).train(train)
    model.blocks = model.blocks[:1]  # positions are added before the first
    for size in (16, 48) if name == "vit_micro" else (160, 256, 320):
        logits = model(pixels(1, 3, size, size))
        assert logits.shape == (1, 5)
        assert logits.isfinite().all()
    model(pixels(1, 3, 64, 32)).sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


@pytest.mark.parametrize("name", VITS)
def test_position_embeddings_are_interpolated_and_the_class_token_is_kept(name: str) -> None:
    """At 1.5 times the size the tokens after the embedding are the patches plus the bicubically resized positions."""
    model = get_new_model(name, num_classes=5).eval()
    stride, old = model.patch_embed.patch_size[0], model.patch_embed.grid_size[0]
    new = 3 * old // 2
    images = pixels(1, 3, new * stride, new * stride)
    tokens: list[Tensor] = []
    model.norm_pre.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    with torch.no_grad():
        nn.init.normal_(model.pos_embed)
        model(images)
        with_class = model.pos_embed.shape[1] == old * old + 1
        position = model.pos_embed[:, 1:] if with_class else model.pos_embed
        position = position.transpose(1, 2).unflatten(2, (old, old))
        position = F.interpolate(position, size=(new, new), mode="bicubic", antialias=True)
        expected = (model.patch_embed.proj(images) + position).flatten(2).transpose(1, 2)
        class_token = model.cls_token + (model.pos_embed[:, :1] if with_class else 0)
    assert with_class == (name != "vit_m")
    torch.testing.assert_close(tokens[0], torch.cat([class_token, expected], dim=1))


@pytest.mark.usefixtures("meta")
def test_image_size_sets_the_number_of_positions() -> None:
    assert get_new_model("vit_s", img_size=256).pos_embed.shape == (1, 16 * 16 + 1, 384)
    assert get_new_model("vit_micro", img_size=64, not_original=True).pos_embed.shape == (1, 16 * 16 + 1, 128)
    assert get_new_model("timm_test_vit", img_size=32).pos_embed.shape == (1, 2 * 2 + 1, 64)
    assert shapes(get_new_model("convnext_tiny", img_size=64)) == shapes(get_new_model("convnext_tiny"))


def test_vit_rejects_images_that_its_patches_do_not_tile() -> None:
    with pytest.raises(AssertionError, match="divisible by patch size"):
        get_new_model("vit_micro", not_original=True)(pixels(1, 3, 30, 30))


def test_timm_vit_runs_at_other_sizes() -> None:
    assert get_new_model("timm_test_vit").eval()(pixels(1, 3, 96, 96)).shape == (1, 1000)


# ----------------------------------------------------------------------------------------------- 32x32 models
@pytest.mark.parametrize("name", MICRO)
def test_micro_models_are_small_and_every_parameter_learns(name: str) -> None:
    sizes, flops = [], []
    for not_original in (False, True):
        model = get_new_model(name, not_original=not_original, num_classes=10)
        with FlopCounterMode(display=False) as counter:
            logits = model(pixels(4, 3, 32, 32))
        flops.append(counter.get_total_flops())
        assert logits.shape == (4, 10)
        F.cross_entropy(logits, torch.arange(4)).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        sizes.append(count(model))
    assert max(sizes) <= 1_500_000
    assert sizes[0] < sizes[1] < 1.03 * sizes[0]
    assert flops[0] < flops[1] < 1.1 * flops[0]
    if name == "convnext_micro":
        assert sizes[0] == 441_514


@pytest.mark.parametrize("not_original", [False, True])
@pytest.mark.parametrize("name", MICRO)
def test_memory_format_does_not_change_the_logits(name: str, not_original: bool) -> None:
    model = get_new_model(name, not_original=not_original, num_classes=10).eval().double()
    x = pixels(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        got = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------- normaliser
def test_normalize_model() -> None:
    inner = get_new_model("vit_micro", num_classes=10).eval()
    model = normalize_model(inner).eval()
    assert [name for name, _ in model.named_children()] == ["normalize", "model"]
    state = model.state_dict()
    assert list(state) == ["normalize.mean", "normalize.std", *(f"model.{name}" for name in inner.state_dict())]
    assert state["normalize.mean"].shape == state["normalize.std"].shape == (1, 3, 1, 1)
    assert state["normalize.mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert state["normalize.std"].flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    x = pixels(2, 3, 32, 32)
    by_hand = torch.stack([(x[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), inner(by_hand))


def test_normalize_model_with_other_numbers() -> None:
    model = normalize_model(nn.Identity(), mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 4.0))
    expected = torch.tensor([1.0, 0.25, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(model(torch.ones(1, 3, 2, 2)), expected)


# --------------------------------------------------------------------------------------------------- blurpool
def blurred(x: Tensor) -> Tensor:
    """Return the binomial 3x3 blur with zero padding, computed from its definition."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    out = torch.zeros_like(x)
    for dy, wy in enumerate((1, 2, 1)):
        for dx, wx in enumerate((1, 2, 1)):
            out += wy * wx / 16 * padded[:, :, dy : dy + height, dx : dx + width]
    return out


def test_blurpool_blurs_plain_grouped_and_same_padded_convolutions() -> None:
    same = timm.layers.create_conv2d(16, 8, 3, stride=2, padding="same")
    assert type(same) is not nn.Conv2d
    convs = [
        (nn.Conv2d(16, 4, 2, stride=2), lambda x: x),
        (nn.Conv2d(32, 32, 3, stride=(1, 2), padding=1, groups=32), lambda x: x),
        (same, lambda x: pad_same(x, (3, 3), (2, 2))),
    ]
    for conv, pad in convs:
        conv.double()
        x = pixels(2, conv.in_channels, 9, 10, dtype=torch.float64)
        expected = F.conv2d(
            pad(blurred(x)), conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        assert add_blurpool(conv) is conv
        torch.testing.assert_close(conv(x), expected)


def test_blurpool_leaves_the_rest_alone_and_blurs_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),  # few channels
        nn.Conv2d(16, 16, 3, padding=1),  # not strided
        nn.Conv2d(16, 16, 2, stride=2),
    ).double()
    x = pixels(1, 3, 17, 17, dtype=torch.float64)
    names = list(model.state_dict())
    expected = model[2](blurred(model[1](model[0](x))))
    add_blurpool(add_blurpool(model))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    assert list(model.state_dict()) == names


def test_blurpool_of_architectures() -> None:
    model = get_new_model("convnext_micro", not_original=True, num_classes=10)
    add_blurpool(model)
    blurring = {name for name, module in model.named_modules() if hasattr(module, "blur_kernel")}
    assert blurring == {f"stages.{stage}.downsample.1" for stage in range(4)}  # the stem's first has 3 channels
    state = get_new_model("convnext_micro", not_original=True, num_classes=10).state_dict()
    model.load_state_dict(state)
    assert model.half().stages[0].downsample[1].blur_kernel.dtype == torch.float16


def test_blurpool_without_a_strided_convolution() -> None:
    with pytest.raises(UserError, match="^use_blurpool: "):
        add_blurpool(get_new_model("vit_micro"))
