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
    """The network to evaluate; unset values come from the run's params.json next to the weights, else the default in brackets."""

    arch: str | None = flag(None, "architecture, as in training [found in the weights]")
    not_original: bool | None = flag(None, "1: ConvStem [found in the weights]")
    add_normalization: bool | None = flag(None, "1: the normaliser is inside the model [found in the weights]")
    updated: bool | None = flag(None, "1: convnext_iso with stem and width 432 [found in the weights]")
    num_classes: int | None = flag(None, "number of classes of the head [found in the weights]", at_least=2)
    use_blurpool: bool | None = flag(None, "1: trained with training.use_blurpool=1 [0]")
    weights_key: str | None = flag(
        None, "key of one network in a file with several [a moving average, else the only one]"
    )
    mean: tuple[float, ...] | None = flag(
        None, "with model.std: normaliser of a network whose file has none, three numbers"
    )
    std: tuple[float, ...] | None = flag(None, "see model.mean", above=0)


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig:
    """The images to attack."""

    val_dataset: str = flag(REQUIRED, "validation images: folder, tar, digits, or hfds/… wds/… tfds/… torch/…")
    root: str = flag("", "root folder of hfds/ tfds/ torch/ data sets (their cache)")
    val_split: str = flag("", "name of the split for timm's readers; empty: validation")
    num_workers: int = flag(0, "decoding processes of each worker; 0: the worker decodes itself", at_least=0)
    classes: str = flag(
        "name",
        "index: folder k is class k, from 0 on where there is a folder 0, else from 1 on; name: matched by name, or sorted",
        choices=("name", "index"),
    )
    class_map: str = flag(
        "",
        'file with the class of each folder: lines "folder class", JSON {"folder": class} or {"class number": "folder"}; '
        "a class is a name, else its number from 0 on, in JSON without quotes always its number",
    )
    labels: str = flag(
        "", 'file with the images of a folder without class folders and their classes: lines "file,class", or a CSV'
    )

    @property
    def own_classes(self) -> list[str]:
        """The flags that say which class is which."""
        given = {
            "data.classes=index": self.classes == "index",
            "data.class_map": self.class_map,
            "data.labels": self.labels,
        }
        return [name for name, value in given.items() if value]


@dataclass(frozen=True, kw_only=True)
class EvalAttackConfig:
    """AutoAttack, its threat models, and the devices it runs on."""

    model_in: tuple[str, ...] = flag((), "weights files, run folders, published names or RobustBench ids, by commas")
    models: str = flag("", "YAML file: a list of weights files, run folders, or {model_in: …, name: …, arch: …}")
    fullaa: bool = flag(True, "1: APGD-CE, APGD-T, FAB-T, Square; 0: the first two")
    attacks: tuple[str, ...] = flag((), "some of AutoAttack's attacks, by commas; unset: see fullaa", choices=ATTACKS)
    norms: tuple[str, ...] = flag(("Linf",), "threat models, separated by commas", choices=NORMS)
    eps: tuple[float, ...] | None = flag(None, "radius of each norm, fractions allowed; unset: 4/255, 2, 75", above=0)
    ids: str = flag("auto", "robustbench: its 5,000 images; auto: those if val_dataset is ImageNet", choices=IMAGE_IDS)
    n_ex: int = flag(5000, "number of images, the first ones; 0: all", at_least=0)
    ci: float | None = flag(
        None,
        "stop once the 95 % interval under every norm is this many points to each side; unset: n_ex images",
        at_least=0.05,
    )
    batch_size: int = flag(100, "images attacked together: a chunk; part of the result's identity", at_least=1)
    img_size: tuple[int, ...] = flag((), "image sizes in pixels, by commas; unset: the network's own", at_least=8)
    crop_pct: float | None = flag(
        None, "centre crop after resizing to img_size/crop_pct; unset: the network's own", above=0, at_most=1
    )
    among: str = flag(
        "all",
        "the classes that attacked images may be taken for: all of the network's, or those of the data set",
        choices=("dataset", "all"),
    )
    seed: int = flag(0, "seed of AutoAttack", at_least=0, at_most=2**32 - 1)
    out: str = flag("", "folder of state and reports; empty: eval/ beside the weights")
    save_adv: bool = flag(False, "1: keep the adversarial images (float32, npz), one file a chunk")
    precision: str = flag(
        "fp32", "tf32: faster on a GPU; what it breaks is confirmed in fp32", choices=("fp32", "tf32")
    )
    compile: bool = flag(False, "1: torch.compile the attacked model; what it breaks is confirmed uncompiled")
    channels_last: bool | None = flag(None, "1: channels_last memory format; unset: 1 on a GPU, 0 on a CPU")
    gpus: str = flag("auto", "auto: every free GPU; 0,1: these; none: the CPU. Under torchrun each process has its own")
    gpu_max_load: float = flag(0.5, "auto: a GPU with a larger load (share of time) is not free", at_least=0, at_most=1)
    gpu_max_memory: float = flag(0.5, "auto: a GPU with more of its memory in use is not free", at_least=0, at_most=1)
    gpu_wait: float = flag(0.0, "auto: minutes to wait for a free GPU; 0: do not wait", at_least=0)
    workers: int = flag(0, "processes on a CPU; 0: as many as eval.threads leaves cores for", at_least=0)
    threads: int = flag(1, "threads of one process on a CPU; part of the result's identity", at_least=1)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The attacks, in AutoAttack's order."""
        if self.attacks:
            return tuple(name for name in ATTACKS if name in self.attacks)
        return ATTACKS if self.fullaa else ATTACKS[:2]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One network to evaluate: weights file or run folder, its name in tables ("": made of the path), and what flags say of it."""

    model_in: str
    name: str
    model: EvalModelConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Everything `runner_aa_eval.py` needs."""

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
                "eval.model_in: expected a file, folder or name, got nothing (an unset shell variable?)."
            )
        if not settings.model_in and not settings.models:
            problems.found.append("eval.model_in: required, but neither it nor eval.models is given.")
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
                f"data: expected at most one of {', '.join(own_classes)}; each says which class is which."
            )
        if settings.gpus not in ("auto", "none") and not re.fullmatch(r"\d+(,\d+)*", settings.gpus):
            problems.found.append(f"eval.gpus: expected auto, none, or GPU numbers such as 0,1; got {settings.gpus!r}.")
        return problems.found

    def networks(self) -> list[ModelEntry]:
        """The networks of `eval.model_in`, then those of the file `eval.models`; `model.*` flags hold where an entry says nothing.

        Raises:
            UserError: the file is missing, not YAML, or has unknown keys or values.
        """
        entries = [ModelEntry(model_in=path, name="", model=self.model) for path in self.eval.model_in]
        return entries + (_read_models_file(Path(self.eval.models), self.model) if self.eval.models else [])


def _read_models_file(path: Path, flags: EvalModelConfig) -> list[ModelEntry]:
    """A list of paths, or of mappings with `model_in`, perhaps `name`, and fields of `EvalModelConfig`."""
    with blame("eval.models"):
        content = read_yaml(path)
    if not isinstance(content, list) or not content:
        found = "an empty one" if content == [] else type(content).__name__
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
