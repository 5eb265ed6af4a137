"""Command line for published models; exit status 2 for wrong input or a failed download."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError, blame
from common.tables import markdown_table
from zoo.published import KNOWN, PUBLISHED, find_published, nearest_published
from zoo.submission import FIELDS, PLACEHOLDER, check_report, form_text, model_info


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program name) and return the exit status."""
    arguments = parser().parse_args(argv)
    warnings.filterwarnings("ignore", ".*torch.jit.*", FutureWarning)  # raised inside timm
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes.", file=sys.stderr)
        return 130
    return 0


def pixels(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise ValueError
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    top = argparse.ArgumentParser(prog="python -m zoo", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    models = command("list", list_models, "list the published models and their accuracies")
    models.add_argument("--all", action="store_true", help="all known models, of all publications")
    command("show", show, "show all data of one model").add_argument("name")
    download = command("download", download_weights, "download robust weights, or a clean initialisation")
    download.add_argument("name")
    download.add_argument("--to", type=Path, help="parent of the folder <name> (default: checkpoints in the project)")
    download.add_argument("--clean", action="store_true", help="the clean initialisation instead of the robust weights")
    download.add_argument("--force", action="store_true", help="download again and accept changed content")
    command("verify", verify_path, "show the SHA-256 and the content of a file").add_argument("path", type=Path)
    export = command("export", export_model, "export safetensors and config.json, for timm and the Hugging Face Hub")
    export.add_argument("name", help="published model, or a path")
    export.add_argument("--to", type=Path, required=True)
    export.add_argument("--img-size", type=pixels, help="image size in pixels (default: the network's own)")
    export.add_argument("--crop-pct", type=share, help="crop of the evaluation transform (default: the network's own)")
    export.add_argument("--push", metavar="REPOSITORY", help="upload to <owner>/<name> on the Hugging Face Hub")
    zero_shot = command("zero-shot", write_classifier, "write a CLIP model of open_clip as an ImageNet classifier")
    zero_shot.add_argument("model", help="open_clip model name, or hf-hub:<owner>/<repository>")
    zero_shot.add_argument("--to", type=Path, required=True)
    zero_shot.add_argument("--tower", type=Path, help="other weights for the image tower, such as those of FARE")
    zero_shot.add_argument("--pretrained", metavar="TAG", help="open_clip's weights tag, such as openai")
    submit = command("submit", print_submission, "print RobustBench's model_info JSON and the text of its form")
    submit.add_argument("report", type=Path, help="report.json of an evaluation")
    for name in FIELDS:
        submit.add_argument(f"--{name}", default=PLACEHOLDER)
    submit.add_argument("--architecture", help="default: the architecture in the report")
    submit.add_argument("--additional-data", action="store_true", help="trained on more data than ImageNet-1k")
    return top


def list_models(arguments: argparse.Namespace) -> None:
    def numbers(which: int, model) -> str:
        pairs = [pair and pair[which] for pair in model.results.values()]
        return " / ".join("–" if number is None else f"{number:.1f}" for number in pairs)

    rows = [
        {"name": model.name, "model": model.title, "px": " / ".join(map(str, model.results))}
        | ({"by": model.by} if arguments.all else {})
        | {"clean": numbers(0, model), "AutoAttack": numbers(1, model)}
        | ({"stronger attack": f"{model.external or ''}"} if arguments.all else {})
        | {"RobustBench": model.robustbench_id or ""}
        for model in (KNOWN if arguments.all else PUBLISHED).values()
    ]
    if arguments.all:
        rows.sort(key=lambda row: row["stronger attack"] or row["AutoAttack"].replace("–", ""), reverse=True)
    print(markdown_table(rows))


def show(arguments: argparse.Namespace) -> None:
    model = find_published(arguments.name)
    if model is None:
        hint = f"; did you mean {near}?" if (near := nearest_published(arguments.name)) else "."
        raise UserError(f"NAME: no published model has the name {arguments.name!r}{hint}")
    for field, value in vars(model).items():
        if value not in (None, "", {}, ()):
            print(f"{field + ':':20}{value}")
    if model.config:
        print(
            f"{'train it:':20}bash run_train.sh --config-file {model.config} --data.train_dataset=… --data.val_dataset=…"
        )
    print(f"{'evaluate it:':20}bash run_eval.sh {model.name} --data.val_dataset=…")


def download_weights(arguments: argparse.Namespace) -> None:
    from zoo.names import locate

    kind = "clean" if arguments.clean else "robust"
    with blame("NAME"):
        print(locate(arguments.name, kind=kind, folder=arguments.to, force=arguments.force).path)


def verify_path(arguments: argparse.Namespace) -> None:
    from zoo.download import WEIGHT_SUFFIXES, verify
    from zoo.inference import describe_weights
    from zoo.loading import read_weights

    print(verify(arguments.path))
    if arguments.path.suffix.lower() in WEIGHT_SUFFIXES:
        with blame("PATH"):
            print(describe_weights(read_weights(arguments.path)))


def export_model(arguments: argparse.Namespace) -> None:
    from zoo.export import export, push
    from zoo.names import load_named

    with blame("NAME"):
        trained = load_named(arguments.name)
    export(trained, arguments.to, img_size=arguments.img_size, crop_pct=arguments.crop_pct)
    print(arguments.to)
    if arguments.push:
        print(push(arguments.to, arguments.push))


def print_submission(arguments: argparse.Namespace) -> None:
    try:
        report = json.loads(arguments.report.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"REPORT: expected the report.json of an evaluation, got {arguments.report} ({error})."
        ) from error
    check_report(report, str(arguments.report))
    print(json.dumps(model_info(report, arguments), indent=2), form_text(report, arguments), sep="\n\n")


def write_classifier(arguments: argparse.Namespace) -> None:
    from zoo.clip import write_zero_shot

    with blame("MODEL"):
        print(write_zero_shot(arguments.model, arguments.to, pretrained=arguments.pretrained, tower=arguments.tower))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
