"""Reports, tables, logs and pictures from the records of evaluations."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from common.errors import UserError
from common.files import read_json, writable, write_atomically
from common.provenance import provenance
from common.tables import markdown_table
from data.loader import print_warning
from evaluation.config import ATTACKS, EvalConfig
from evaluation.images import ImageList
from evaluation.pictures import draw_accuracy, draw_examples
from evaluation.plan import Evaluation, show_eps
from evaluation.records import LATER_LISTS, LISTS
from evaluation.reliability import flags
from evaluation.stopping import METHOD, anytime_interval
from zoo.published import EPS

CHECKS = ("outside_ball", "outside_box", "not_misclassified", "not_finite")
PUBLISHED_IMAGES = 5000
SUSPICIOUS = 0.3  # percentage points between this evaluation and the same published one
FAR_BELOW = 20.0  # percentage points below the validation accuracy of the training run
AT_CHANCE = 0.05  # p-value above which an accuracy counts as guessing
NEAR_CHANCE = 0.1  # and its largest distance above the accuracy of guessing
NEEDED = {
    "robust_ci95",
    "chunks",
    "ci",
    "run",
    "published",
    "flags",
    "classes",
}  # keys of a report that need not be written again

Record = Mapping[str, Any]


def summarise(evaluation: Evaluation, records: Sequence[Record], config: EvalConfig) -> dict[str, Any]:
    """Return the report of a finished evaluation as plain values. Accuracies are shares of the decodable images.

    Args:
        evaluation: the evaluation.
        records: records of all chunks, in order.
        config: flags of this call.

    Returns:
        Among others `clean_acc`, `acc_after` each attack, `robust_acc` and its 95 % interval `robust_ci95` (Wilson; with
        `eval.ci`, one that stays valid if stopping depends on the results); the `max_perturbation` and `pixel_range` found;
        `check`: positions of images that fail the final check; `flags`: sentences on signs of overestimated robustness;
        `seconds`: time during which at least one chunk ran, including restarts; `worker_seconds`, `gpu_seconds`: sums over
        workers.
    """
    broken_by = [broken for record in records for broken in record["broken_by"]]
    n, points, identity = len(broken_by), config.eval.ci, evaluation.identity
    if not n:
        raise UserError(f"data.val_dataset: none of the {evaluation.n} images of {evaluation} could be decoded.")
    standing = sum(broken != "clean" for broken in broken_by)
    clean, acc_after, attack_seconds = standing / n, {}, {}
    for attack in identity["attack"]["attacks"]:
        standing -= broken_by.count(attack)
        acc_after[attack] = standing / n
        attack_seconds[attack] = round(sum(record["attack_seconds"].get(attack, 0.0) for record in records), 2)
    interval = binomtest(standing, n).proportion_ci(0.95, method="wilson")
    if points:
        interval = anytime_interval(standing, n, points=points)
    checks = [(record["positions"], record["check"]) for record in records if record["check"]]
    ranges = [check["pixel_range"] for _, check in checks]
    on_gpu = [record["seconds"] for record in records if record["device"] != "cpu"]
    return {
        "network": {"name": evaluation.network, "weights": str(evaluation.weights), **identity["network"]},
        "data": {"val_dataset": config.data.val_dataset, **identity["data"]}
        | {"unreadable": [name for record in records for name in record["unreadable"]]},
        "transform": {**identity["transform"], "from": evaluation.preprocessing.source},
        "run": asdict(evaluation.run),
        **identity["attack"],
        "among": "all" if evaluation.among is None else "dataset",
        "classes": {
            "network": evaluation.description.num_classes,
            "dataset": len(evaluation.classes),
            "among": evaluation.outputs,
        },
        "n": n,
        "clean_acc": clean,
        "acc_after": acc_after,
        "robust_acc": standing / n,
        "robust_ci95": [float(bound) for bound in interval],
        "interval": METHOD if points else "Wilson",
        "chunks": len(records),
        "ci": points,
        "max_perturbation": max(check["max_perturbation"] for _, check in checks),
        "pixel_range": [min(low for low, _ in ranges), max(high for _, high in ranges)],
        "check": {name: [positions[i] for positions, check in checks for i in check[name]] for name in CHECKS},
        "flags": list(flags(records, identity["attack"]["attacks"])),
        "images_kept": sum(record["images_kept"] for record in records),
        "rejoined": sum(record["rejoined"] for record in records),
        "seconds": round(_covered([(r["started"], r["started"] + r["seconds"]) for r in records]), 2),
        "worker_seconds": round(sum(record["seconds"] for record in records), 2),
        "gpu_seconds": round(sum(on_gpu), 2),
        "attack_seconds": attack_seconds,
        "devices": dict(Counter(record["device"] for record in records)),
        "arithmetic": identity["arithmetic"],
        "versions": identity["versions"],
        "provenance": provenance(),
    }


def compare_with_published(
    evaluation: Evaluation, report: Mapping[str, Any], images: ImageList
) -> dict[str, Any] | None:
    """Compare an evaluation of a published model with its published numbers; None for other networks.

    Returns:
        `name`; published `clean`, `autoattack` and, if known, `external` (of a stronger attack) in %; `differs`: differences from
        the published evaluation, in words. If there is none, also `difference` and `clean_difference` of this evaluation in
        percentage points, and whether one of them is `suspicious`: on the same images, the numbers should agree up to rounding.
    """
    model = evaluation.published
    if model is None:
        return None
    numbers = model.results.get(evaluation.img_size) or next(iter(model.results.values()))
    robust = model.autoattack(report["norm"], report["eps"], evaluation.img_size)
    differs = list(_differs_from_published(evaluation, report, images))
    found = {"name": model.name, "differs": differs, "external": model.external if report["norm"] == "Linf" else None}
    if numbers is None or numbers.autoattack is None:
        return found | {"differs": ["no number under AutoAttack is published"], "clean": None, "autoattack": None}
    found |= {"clean": numbers.clean, "autoattack": numbers.autoattack if robust is None else robust}
    if not differs:
        found["difference"] = round(100 * report["robust_acc"] - robust, 2)
        found["clean_difference"] = round(100 * report["clean_acc"] - numbers.clean, 2)
        found["suspicious"] = max(abs(found["difference"]), abs(found["clean_difference"])) > SUSPICIOUS
    return found


def _differs_from_published(evaluation: Evaluation, report: Mapping[str, Any], images: ImageList) -> Iterator[str]:
    """Yield the differences from the published evaluation: AutoAttack on RobustBench's images, equally preprocessed."""
    model, used, unreadable = evaluation.published, evaluation.preprocessing, len(report["data"]["unreadable"])
    if model.unlike:
        yield model.unlike
    if all(model.autoattack(report["norm"], report["eps"], size) is None for size in model.results):
        norm = report["norm"] if report["norm"] in model.other_norms else "Linf"
        yield f"{report['norm']} {show_eps(report['eps'])} instead of {norm} {show_eps(EPS[norm])}"
    if missing := [attack for attack in ATTACKS if attack not in report["attacks"]]:
        yield f"without {', '.join(missing)}"
    if not images.robustbench:
        yield "other images than RobustBench's 5,000"
    elif report["n"] + unreadable != PUBLISHED_IMAGES:
        yield f"{report['n'] + unreadable} of RobustBench's 5,000 images"
    if len(images) > 1 and images.common_size is not None:
        yield f"images that are already resized to {images.common_size}, as those of ImageNet-C"
    if "weights_key" in report["network"]:
        yield f"weights_key={report['network']['weights_key']}"
    for name, value in {"use_blurpool": False, **model.description}.items():
        if value is not None and (found := report["network"].get(name)) != value:
            yield f"{name}={int(found) if isinstance(found, bool) else found}"
    if report["arithmetic"]["precision"] != "fp32" or report["arithmetic"]["compile"]:
        yield "attacked in tf32 or compiled"
    if unreadable:
        yield f"{unreadable} images could not be decoded"
    # Some numbers are published at a second size, with the same crop.
    theirs = model.preprocessing or used
    own = theirs if evaluation.img_size not in model.results else replace(theirs, img_size=used.img_size)
    if str(replace(used, source="")) != str(replace(own, source="")):
        yield f"images {used}, published with {own}"


def write_evaluation(
    evaluation: Evaluation, records: Sequence[Record], images: ImageList, config: EvalConfig, examples: Path
) -> dict[str, Any]:
    """Write verdicts.csv, log.txt, accuracy.png, examples.png and (last) report.json into the evaluation's folder.

    Args:
        evaluation, records, config: as in `summarise`.
        images: the image list, for names.
        examples: file with the images of the first chunk and their adversarial images; without it there is no examples.png.

    Returns:
        The report.
    """
    report = summarise(evaluation, records, config)
    report["published"] = compare_with_published(evaluation, report, images)
    folder = evaluation.folder
    write_text(folder / "verdicts.csv", verdicts_csv(records, images.keys))
    write_text(folder / "log.txt", text_log(report, records))
    draw_accuracy(folder / "accuracy.png", {str(evaluation): curve(report)})
    if examples.exists():
        names = evaluation.class_names
        with np.load(examples) as arrays:
            labels = [str(label) if names is None else names[label] for label in arrays["y"]]
            attacked = {"adversarial": (arrays["x_adv"], arrays["broken_by"].tolist())}
            draw_examples(folder / "examples.png", arrays["x"], attacked, labels=labels, title=str(evaluation))
    else:
        print(f"note: {examples} does not exist on this machine, so examples.png is not drawn.", file=sys.stderr)
    write_json(folder / "report.json", report)
    return report


def read_report(evaluation: Evaluation, *, chunks: int, ci: float | None) -> dict[str, Any] | None:
    """Read the report written earlier for this number of chunks and `eval.ci`; None if it must be written (again)."""
    with suppress(UserError):
        report = read_json(evaluation.folder / "report.json") or {}
        whole = NEEDED <= report.keys() and (evaluation.folder / "verdicts.csv").exists()
        return report if whole and (report["chunks"], report["ci"]) == (chunks, ci) else None
    return None


def verdicts_csv(records: Sequence[Record], keys: Sequence[str]) -> str:
    """Return CSV with one line per image: position, path, label, prediction without attack, `broken_by`, adversarial prediction.

    The last one is empty for records of earlier versions, which lack it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "path", "label", "clean_pred", "broken_by", "adv_pred"])
    for record in records:
        positions = record["positions"]
        lists = [record.get(name, [""] * len(positions)) for name in (*LISTS[1:], *LATER_LISTS)]
        writer.writerows([position, keys[position], *verdict] for position, *verdict in zip(positions, *lists))
    return text.getvalue()


def text_log(report: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the evaluation in the format of AutoAttack's log."""
    lines = [
        f"{report['network']['name']}: standard version including {', '.join(report['attacks'])}; seed {report['seed']}",
        f"initial accuracy: {report['clean_acc']:.2%}",
    ]
    total = 0.0
    for i, attack in enumerate(report["attacks"]):
        before = {"", *report["attacks"][i:]}
        for number, record in enumerate(records, 1):
            left = sum(broken in before for broken in record["broken_by"])
            if left:
                broken = record["broken_by"].count(attack)
                lines.append(f"{attack} - {number}/{len(records)} - {broken} out of {left} successfully perturbed")
        total += report["attack_seconds"][attack]
        lines.append(
            f"robust accuracy after {attack.upper()}: {report['acc_after'][attack]:.2%} (total time {total:.1f} s)"
        )
    low, high = report["pixel_range"]
    lines.append(
        f"max {report['norm']} perturbation: {report['max_perturbation']:.5f}, max: {high:.5f}, min: {low:.5f}, "
        f"images that fail the final check: {_failures(report) or 'none'}"
    )
    lines.append(f"robust accuracy: {report['robust_acc']:.2%}")
    return "\n".join(lines) + "\n"


def write_overview(
    evaluations: Sequence[Evaluation], reports: Sequence[Mapping[str, Any]], root: Path, *, save_adv: bool
) -> None:
    """Write table.md, summary.json and accuracy.png of all evaluations into `root`; print the table and warnings.

    Raises:
        UserError: the files cannot be written.
    """
    joint = unions(evaluations, reports)
    table = results_table(evaluations, reports, joint)
    compared = [text for report in reports if (text := comparison_text(report))]
    warned = [
        f"{evaluation}: {text}."
        for evaluation, report in zip(evaluations, reports)
        for text in warnings_of(report, save_adv=save_adv)
    ]
    seen = dict.fromkeys(f"{e.network} gets images of {e.preprocessing}, {e.fed}." for e in evaluations)
    sentences = [*seen, *compared, *(f"Warning: {text}" for text in warned)]
    with writable("eval.out", root):
        write_json(root / "summary.json", {"evaluations": reports, "unions": joint})
        write_text(root / "table.md", "\n".join([table, "", *(f"- {text}" for text in sentences), ""]))
        draw_accuracy(root / "accuracy.png", {str(e): curve(r) for e, r in zip(evaluations, reports)})
    print("\n".join([table, *compared]))
    for text in warned:
        print_warning(text)
    print(f"reports: {root}")


def unions(evaluations: Sequence[Evaluation], reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each network and size with several norms, the accuracy under the union of the threat models.

    An image counts as robust if no attack of any norm broke it.
    """
    found = []
    for (network, size), group in groupby(zip(evaluations, reports), key=lambda pair: pair[0].group):
        members, of_group = zip(*group)
        if len(members) > 1:
            survivors = [_survivors(evaluation.folder / "verdicts.csv") for evaluation in members]
            n, clean = of_group[0]["n"], of_group[0]["clean_acc"]
            found.append(
                {"network": network, "img_size": size, "norms": [evaluation.norm for evaluation in members], "n": n}
                | {"clean_acc": clean, "robust_acc": len(set.intersection(*survivors)) / n}
            )
    return found


def results_table(
    evaluations: Sequence[Evaluation], reports: Sequence[Mapping[str, Any]], joint: Sequence[Mapping[str, Any]]
) -> str:
    """Return a Markdown table with a row for each evaluation and each union."""
    rows: list[dict[str, Any]] = []
    for evaluation, report in zip(evaluations, reports):
        low, high = report["robust_ci95"]
        rows.append(
            {"network": evaluation.network, "px": evaluation.img_size}
            | {"norm": evaluation.norm, "eps": show_eps(evaluation.eps), "images": report["n"]}
            | {name: percent(share) for name, share in curve(report).items()}
            | {"robust": percent(report["robust_acc"]), "95 %": f"{100 * low:.1f} – {100 * high:.1f}"}
            | {"hours": f"{report['worker_seconds'] / 3600:.2f}"}
        )
    for union in joint:
        rows.append(
            dict.fromkeys(rows[0], "")
            | {"network": union["network"], "px": union["img_size"], "norm": " ∪ ".join(union["norms"])}
            | {"images": union["n"], "clean": percent(union["clean_acc"]), "robust": percent(union["robust_acc"])}
        )
    return markdown_table(rows)


def curve(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracy without attack and after each attack."""
    return {"clean": report["clean_acc"], **report["acc_after"]}


def comparison_text(report: Mapping[str, Any]) -> str:
    """Return one line on the published number; empty if there is none."""
    published = report.get("published")
    if not published or published["autoattack"] is None:
        return ""
    robust, clean = 100 * report["robust_acc"], 100 * report["clean_acc"]
    name, number = published["name"], f"published {published['autoattack']:.1f} %"
    if published["external"] is not None:
        number += f" ({published['external']:.1f} % under a stronger attack)"
    if published["differs"]:
        low, high = (100 * bound for bound in report["robust_ci95"])
        return (
            f"{name}: not compared with the published number ({published['autoattack']:.1f} %), because of "
            f"{'; '.join(published['differs'])}. Robust here: {robust:.2f} %, 95 % interval {low:.1f} – {high:.1f} for a sample of "
            f"{report['n']} images."
        )
    text = (
        f"{name}: AutoAttack {robust:.2f} %, {number}: {published['difference']:+.2f} points; clean {clean:.2f} %, published "
        f"{published['clean']:.1f} %: {published['clean_difference']:+.2f}."
    )
    if published["suspicious"]:
        text += (
            f" SUSPICIOUS: more than {SUSPICIOUS} points apart on the same images. Check crop and interpolation, normaliser, "
            "eval.precision, and the versions in report.json."
        )
    return text


def warnings_of(report: Mapping[str, Any], *, save_adv: bool = False) -> Iterator[str]:
    """Yield warnings that a reader of the numbers should know."""
    yield from _warnings_of_accuracy(report)
    yield from report["flags"]
    low, high = report["robust_ci95"]
    if report["ci"] and 50 * (high - low) > report["ci"]:
        yield f"all {report['n']} images of the evaluation (eval.n_ex) are not enough for ± {report['ci']:g} percentage points"
    if save_adv and (kept := report["images_kept"]) < report["n"]:
        yield f"adversarial images of {kept} of {report['n']} images are saved; run the command again for the others"
    if failures := _failures(report):
        yield f"adversarial images that fail the final check: {failures}; their positions are in report.json"
    if len(devices := report["devices"]) > 1:
        yield f"chunks were computed on different devices ({', '.join(devices)}), whose rounding differs"
    if unreadable := report["data"]["unreadable"]:
        yield f"{len(unreadable)} images could not be decoded and are omitted, the first: {unreadable[0]}"


def _warnings_of_accuracy(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings if the clean accuracy suggests other inputs than in training, or if the radius is not that of training."""
    clean, n, run, used = report["clean_acc"], report["n"], report["run"], report["transform"]
    chance = 1 / report["classes"]["among"]
    shown = f"{report['data']['img_size']} px, crop {used['crop_pct']:g}, {used['resize']} ({used['from']})"
    before = run["clean_acc"]
    if before is not None and 100 * (before - clean) > FAR_BELOW:
        yield (
            f"clean accuracy {percent(clean)}, but {percent(before)} in the validation of the training run: most likely the "
            f"images, the image size or the crop differ; here {shown}"
        )
    elif clean - chance <= NEAR_CHANCE and binomtest(round(clean * n), n, chance, "greater").pvalue > AT_CHANCE:
        cause = (
            f"most likely a missing or second normaliser (model.add_normalization), classes in another order (data.class_map), or "
            f"another image size; here {shown}"
            if before is None
            else f"the validation of the training run measured {percent(before)}"
        )
        yield f"clean accuracy {percent(clean)} of {n} images is no better than guessing: {cause}"
    if run["norm"] == report["norm"] and abs(run["eps"] - report["eps"]) > 1e-9:
        yield f"trained for {run['norm']} {show_eps(run['eps'])}, attacked at {show_eps(report['eps'])}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values as JSON, atomically."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def percent(share: float) -> str:
    """Format a share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def _failures(report: Mapping[str, Any]) -> str:
    return ", ".join(f"{len(places)} {name.replace('_', ' ')}" for name, places in report["check"].items() if places)


def _survivors(verdicts: Path) -> set[str]:
    with open(verdicts, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["index"] for row in csv.DictReader(file) if not row["broken_by"]}


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
