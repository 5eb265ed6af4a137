"""Published models from the command line.

python -m zoo list [--all]                          the published models and their numbers; --all: everybody's
python -m zoo show NAME                             all that is known of one
python -m zoo download NAME [--to DIR] [--clean] [--force]
                                                    its robust weights, or its clean initialisation
python -m zoo verify PATH                           SHA-256 of a file, and what it holds
python -m zoo export NAME|PATH --to DIR [--push REPOSITORY]
                                                    safetensors and config.json, for timm and the Hugging Face Hub
python -m zoo submit REPORT.json [--title …]        RobustBench's model_info JSON and the text of its form
python -m zoo zero-shot MODEL --to DIR [--tower FILE] [--pretrained TAG]
                                                    a CLIP model of open_clip as ImageNet classifier

Exit status 2 for wrong input or a download that failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, blame
from common.tables import markdown_table


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list").add_argument("--all", action="store_true", help="all that are known by name")
    commands.add_parser("show").add_argument("name")
    download = commands.add_parser("download")
    download.add_argument("name")
    download.add_argument("--to", type=Path, help="where a folder <name> is made (default: checkpoints in the project)")
    download.add_argument("--clean", action="store_true", help="the clean initialisation instead of the robust weights")
    download.add_argument("--force", action="store_true", help="download again, and accept changed content")
    commands.add_parser("verify").add_argument("path", type=Path)
    export = commands.add_parser("export")
    export.add_argument("name")
    export.add_argument("--to", type=Path, required=True)
    export.add_argument("--img-size", type=int, help="pixels that it is meant for (default: the network's own)")
    export.add_argument("--crop-pct", type=float, help="of the evaluation transform (default: the network's own)")
    export.add_argument("--push", metavar="REPOSITORY", help="upload to <owner>/<name> of the Hugging Face Hub")
    zero_shot = commands.add_parser("zero-shot")
    zero_shot.add_argument("model", help="open_clip's name, or hf-hub:<owner>/<repository>")
    zero_shot.add_argument("--to", type=Path, required=True)
    zero_shot.add_argument("--tower", type=Path, help="other weights of the image tower, such as FARE's")
    zero_shot.add_argument("--pretrained", metavar="TAG", help="open_clip's tag of weights, such as openai")
    submit = commands.add_parser("submit")
    submit.add_argument("report", type=Path)
    for name in ("title", "link", "authors", "venue", "checkpoint", "architecture"):
        submit.add_argument(f"--{name}", default="")
    submit.add_argument("--additional-data", action="store_true", help="trained with more than ImageNet-1k")
    return top


def list_models(arguments: argparse.Namespace) -> None:
    from zoo.published import KNOWN, PUBLISHED

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
    model = published(arguments.name)
    for field, value in vars(model).items():
        print(f"{field + ':':20}{value if value not in (None, '', {}) else '–'}")
    if model.config:
        print(
            f"{'train it:':20}bash run_train.sh --config-file {model.config} --data.train_dataset=… --data.val_dataset=…"
        )
    print(f"{'evaluate it:':20}bash run_eval.sh {model.name} --data.val_dataset=…")


def download(arguments: argparse.Namespace) -> None:
    from zoo.names import locate

    kind = "clean" if arguments.clean else "robust"
    with blame("NAME"):
        print(locate(arguments.name, kind=kind, folder=arguments.to, force=arguments.force).path)


def verify(arguments: argparse.Namespace) -> None:
    from zoo.download import WEIGHT_SUFFIXES
    from zoo.download import verify as digest_of
    from zoo.inference import describe_weights
    from zoo.loading import read_weights

    print(digest_of(arguments.path))
    if arguments.path.suffix.lower() in WEIGHT_SUFFIXES:
        with blame("PATH"):
            print(describe_weights(read_weights(arguments.path)))


def export(arguments: argparse.Namespace) -> None:
    from zoo.description import NetworkDescription
    from zoo.export import export as write
    from zoo.export import push
    from zoo.names import locate
    from zoo.runs import load_trained

    with blame("NAME"):
        located = locate(arguments.name)
        trained = load_trained(located.path, located.describe(NetworkDescription()))
    own = located.preprocessing or trained.preprocessing
    size, crop_pct = arguments.img_size or own.img_size, arguments.crop_pct or own.crop_pct
    write(trained, arguments.to, img_size=size, crop_pct=crop_pct)
    print(arguments.to)
    if arguments.push:
        print(push(arguments.to, arguments.push))


def submit(arguments: argparse.Namespace) -> None:
    from zoo.submission import Paper, check_report, form_text, model_info

    try:
        report = json.loads(arguments.report.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"REPORT: expected a report.json of an evaluation, got {arguments.report} ({error})."
        ) from error
    check_report(report, str(arguments.report))
    given = {name: getattr(arguments, name) for name in ("title", "link", "authors", "venue", "checkpoint")}
    paper = Paper(**{name: value for name, value in given.items() if value}, additional_data=arguments.additional_data)
    architecture = arguments.architecture or report["network"]["arch"]
    print(json.dumps(model_info(report, paper, architecture=architecture), indent=2))
    print()
    print(form_text(report, paper, architecture=architecture))


def zero_shot(arguments: argparse.Namespace) -> None:
    from zoo.clip import write_zero_shot

    with blame("MODEL"):
        print(write_zero_shot(arguments.model, arguments.to, pretrained=arguments.pretrained, tower=arguments.tower))


def published(name: str):
    """The published model of that name; UserError with the nearest one where there is none."""
    from zoo.published import find_published, nearest_published

    model = find_published(name)
    if model is None:
        near = nearest_published(name)
        raise UserError(f"NAME: no published model is called {name!r}{f'; did you mean {near}?' if near else '.'}")
    return model


COMMANDS = {
    "list": list_models,
    "show": show,
    "download": download,
    "verify": verify,
    "export": export,
    "submit": submit,
    "zero-shot": zero_shot,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
