"""The flags of `runner_aa_eval.py`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from attacks.norms import DEFAULT_EPS, NORMS, check_radius
from common.errors import Problems, UserError, blame
from common.flags import REQUIRED, Config, converted, flag, read_yaml
from zoo.description import NetworkDescription

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")  # of AutoAttack's version "standard", in its order
IMAGE_IDS = ("auto", "robustbench", "all")


@dataclass(frozen=True, kw_only=True)
class EvalModelConfig(NetworkDescription):
    """The network to evaluate; unset values come from params.json next to the weights, else the default in brackets applies."""

    arch: str | None = flag(None, "architecture, as in training [found in the weights]")
    not_original: bool | None = flag(None, "1: ConvStem [found in the weights]")
    add_normalization: bool | None = flag(None, "1: the model contains its normaliser [found in the weights]")
    updated: bool | None = flag(None, "1: convnext_iso with stem and width 432 [found in the weights]")
    num_classes: int | None = flag(None, "number of classes of the head [found in the weights]", at_least=2)
    use_blurpool: bool | None = flag(None, "1: trained with training.use_blurpool=1 [0]")
    weights_key: str | None = flag(
        None, "key of one network in a file with several [the EMA weights, else the only one]"
    )
    mean: tuple[float, ...] | None = flag(
        None, "with model.std: normaliser of a network whose file has none; three numbers"
    )
    std: tuple[float, ...] | None = flag(None, "see model.mean", above=0)


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig:
    """The images to attack."""

    val_dataset: str = flag(REQUIRED, "validation images: folder, tar, digits, or hfds/…, wds/…, tfds/…, torch/…")
    root: str = flag("", "root folder (cache) of hfds/, tfds/, torch/ data sets")
    val_split: str = flag("", "split name for timm's readers; empty: validation")
    num_workers: int = flag(0, "decoding processes per worker; 0: the worker itself decodes", at_least=0)
    classes: str = flag(
        "name",
        "index: folder k is class k, counted from 0 if there is a folder 0, else from 1; name: matched by name, or sorted",
        choices=("name", "index"),
    )
    class_map: str = flag(
        "",
        'file with the class of each folder: lines "folder class", JSON {"folder": class} or {"class number": "folder"}; '
        "a class is a name, else a number counted from 0; a JSON number is always a class number",
    )
    labels: str = flag(
        "", 'for a folder without class folders, a file with the class of each image: lines "file,class", or a CSV'
    )

    @property
    def own_classes(self) -> list[str]:
        """Flags that determine the class numbers."""
        given = {
            "data.classes=index": self.classes == "index",
            "data.class_map": self.class_map,
            "data.labels": self.labels,
        }
        return [name for name, value in given.items() if value]


@dataclass(frozen=True, kw_only=True)
class EvalAttackConfig:
    """AutoAttack, its threat models, and its devices."""

    model_in: tuple[str, ...] = flag((), "comma-separated weights files, run folders, published or RobustBench names")
    models: str = flag("", "YAML file: a list of weights files, run folders, or {model_in: …, name: …, arch: …}")
    fullaa: bool = flag(True, "1: APGD-CE, APGD-T, FAB-T, Square; 0: the first two of them")
    attacks: tuple[str, ...] = flag((), "comma-separated AutoAttack attacks; unset: see fullaa", choices=ATTACKS)
    norms: tuple[str, ...] = flag(("Linf",), "comma-separated threat models", choices=NORMS)
    eps: tuple[float, ...] | None = flag(None, "radius for each norm, fractions allowed; unset: 4/255, 2, 75", above=0)
    ids: str = flag("auto", "robustbench: its 5,000 images; auto: these if val_dataset is ImageNet", choices=IMAGE_IDS)
    n_ex: int = flag(5000, "use the first n_ex images; 0: all", at_least=0)
    ci: float | None = flag(
        None,
        "stop when the 95 % interval of each norm is at most ± this many percentage points; unset: n_ex images",
        at_least=0.05,
    )
    batch_size: int = flag(100, "images per chunk, attacked as one batch; results depend on it", at_least=1)
    img_size: tuple[int, ...] = flag((), "comma-separated image sizes in px; unset: the network's own", at_least=8)
    crop_pct: float | None = flag(
        None, "centre crop after resizing to img_size/crop_pct; unset: the network's own", above=0, at_most=1
    )
    among: str = flag(
        "all",
        "classes that predictions are taken from: all of the network, or those of the data set",
        choices=("dataset", "all"),
    )
    seed: int = flag(0, "seed of AutoAttack", at_least=0, at_most=2**32 - 1)
    out: str = flag("", "folder for state and reports; empty: eval/ next to the weights")
    save_adv: bool = flag(False, "1: save the adversarial images (float32, npz), one file per chunk")
    precision: str = flag(
        "fp32", "tf32: faster on a GPU; adversarial images are confirmed in fp32", choices=("fp32", "tf32")
    )
    compile: bool = flag(False, "1: torch.compile the attacked model; adversarial images are confirmed uncompiled")
    channels_last: bool | None = flag(None, "1: channels_last memory format; unset: 1 on a GPU, 0 on a CPU")
    gpus: str = flag("auto", "auto: every free GPU; 0,1: these; none: the CPU. Under torchrun: one GPU per process")
    gpu_max_load: float = flag(0.5, "auto: a GPU with a higher load (share of time) is not free", at_least=0, at_most=1)
    gpu_max_memory: float = flag(0.5, "auto: a GPU with more of its memory in use is not free", at_least=0, at_most=1)
    gpu_wait: float = flag(0.0, "auto: minutes to wait for a free GPU; 0: do not wait", at_least=0)
    workers: int = flag(0, "processes on a CPU; 0: number of cores / eval.threads", at_least=0)
    threads: int = flag(1, "threads per process on a CPU; results depend on it", at_least=1)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The attacks, in AutoAttack's order."""
        if self.attacks:
            return tuple(name for name in ATTACKS if name in self.attacks)
        return ATTACKS if self.fullaa else ATTACKS[:2]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One network to evaluate: weights file or run folder, its name in tables ("": derived from the path), and its flags."""

    model_in: str
    name: str
    model: EvalModelConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """All flags of `runner_aa_eval.py`."""

    model: EvalModelConfig
    data: EvalDataConfig
    eval: EvalAttackConfig

    def __post_init__(self) -> None:
        if self.eval.eps is None:
            eps = tuple(DEFAULT_EPS[norm] for norm in self.eval.norms)
            object.__setattr__(self, "eval", dataclasses.replace(self.eval, eps=eps))

    def problems(self) -> list[str]:
        settings, problems = self.eval, Problems()
        norms, eps = settings.norms, settings.eps
        for name in ("norms", "img_size", "model_in", "attacks"):
            values = getattr(settings, name)
            if len(set(values)) != len(values):
                problems.found.append(f"eval.{name}: expected each value once, got {','.join(map(str, values))}.")
        if "" in settings.model_in:
            problems.found.append(
                "eval.model_in: expected a file, folder or name, got an empty value (an unset shell variable?)."
            )
        if not settings.model_in and not settings.models:
            problems.found.append("eval.model_in: required, because eval.models is not given.")
        if len(eps) != len(norms):
            problems.found.append(
                f"eval.eps: expected one radius for each of eval.norms={','.join(norms)}, separated by commas, got {len(eps)}."
            )
        for norm, radius in zip(norms, eps):
            with problems.caught(), blame("eval.eps"):
                check_radius(norm, radius, size=min(settings.img_size, default=224))
        own_classes = self.data.own_classes + (["eval.ids=robustbench"] if settings.ids == "robustbench" else [])
        if len(own_classes) > 1:
            problems.found.append(
                f"data: expected at most one of {', '.join(own_classes)}; each determines the class numbers."
            )
        if settings.gpus not in ("auto", "none") and not re.fullmatch(r"\d+(,\d+)*", settings.gpus):
            problems.found.append(f"eval.gpus: expected auto, none, or GPU numbers such as 0,1; got {settings.gpus!r}.")
        return problems.found

    def networks(self) -> list[ModelEntry]:
        """Return the networks of `eval.model_in`, then those of the file `eval.models`; `model.*` flags are an entry's defaults.

        Raises:
            UserError: the file is missing, is not YAML, or has unknown keys or values.
        """
        entries = [ModelEntry(model_in=path, name="", model=self.model) for path in self.eval.model_in]
        return entries + (_read_models_file(Path(self.eval.models), self.model) if self.eval.models else [])


def _read_models_file(path: Path, flags: EvalModelConfig) -> list[ModelEntry]:
    """Read a list of paths, or of mappings with `model_in`, optionally `name`, and fields of `EvalModelConfig`."""
    with blame("eval.models"):
        content = read_yaml(path)
    if not isinstance(content, list) or not content:
        found = "an empty list" if content == [] else type(content).__name__
        raise UserError(f"eval.models: expected a list of networks in {path}, got {found}.")
    entries = []
    for number, item in enumerate(content, 1):
        where = f"eval.models: {path}, network {number}"
        item = {"model_in": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not isinstance(item.get("model_in"), str):
            raise UserError(f"{where}: expected a path, or a mapping with model_in, got {item!r}.")
        given = dict(item)
        model_in, name = given.pop("model_in"), given.pop("name", "")
        if not isinstance(name, str):
            raise UserError(f"{where}: name: expected text, got {name!r}.")
        with blame(where):
            values = converted(EvalModelConfig, given)
        entries.append(ModelEntry(model_in=model_in, name=name, model=dataclasses.replace(flags, **values)))
    return entries
