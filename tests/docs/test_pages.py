"""README.md and docs/: links, commands, names of tests, and lengths. tests/docs/pages.py says how blocks are marked."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from ablation.subset import write_subset
from common.errors import UserError
from common.provenance import PROJECT
from tests.docs.commands import FOREIGN, Unknown, check_command
from tests.docs.pages import Block, Page, project_pages, slug_of
from tests.docs.shell import Command, missed, recorded, syntax_error
from tools.flags import PAGE, is_current

PAGES = project_pages()
README_LINES = 180
LONGEST = 160
GENERATED = ["docs/evidence.md", "docs/flags.md"]  # their lines are as long as they get
RUN_SECONDS = 900  # for the blocks of one page


@functools.cache
def folder_of(page: Page) -> Path:
    """Return a folder that holds configs/ and the files that the page shows in its blocks."""
    place = tempfile.TemporaryDirectory(prefix="pages")
    _kept.append(place)
    folder = Path(place.name)
    shutil.copytree(PROJECT / "configs", folder / "configs")
    write_shown_files(page, folder)
    return folder


_kept: list[tempfile.TemporaryDirectory] = []  # deleted at the end of the program


def write_shown_files(page: Page, folder: Path) -> None:
    """Write the files that the page shows, `# grid.yaml` in the first line of a block, unless they are the project's."""
    for block in page.blocks:
        if block.file_name and not (folder / block.file_name).exists():
            (folder / block.file_name).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file_name).write_text(block.text, encoding="utf-8")


@functools.cache
def commands_of(block: Block) -> tuple[list[Command], str]:
    return recorded(block, folder_of(PAGES[block.page]))


BLOCKS = [block for page in PAGES.values() for block in page.shell_blocks]
TESTED = [block for block in BLOCKS if not block.mark.startswith("no test") and not syntax_error(block)]
COMMANDS = [command for block in TESTED for command in commands_of(block)[0]]
MARKED = [page for page in PAGES.values() if any(block.mark == "run" for block in page.shell_blocks)]

each_page = pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))


# ----------------------------------------------------------------------------------------------------------- links
@each_page
def test_links_lead_somewhere(page: Page) -> None:
    wrong = []
    for line, link in page.links():
        if re.match(r"[a-z][a-z+.-]*:", link, re.IGNORECASE):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (PROJECT / page.name).parent / path if path else PROJECT / page.name
        name = os.path.relpath(target, PROJECT)
        if path.startswith("/") or name.startswith("..") or not target.exists():
            wrong.append(f"{page.name}:{line}: {link}: no such file")
        elif anchor and anchor not in (PAGES[name].anchors if name in PAGES else ()):
            wrong.append(f"{page.name}:{line}: {link}: no such heading")
    assert not wrong


@pytest.mark.parametrize(
    ("heading", "slug"),
    [
        ("Quick start", "quick-start"),
        ("`train.py`: flags, and *more*", "trainpy-flags-and-more"),
        ("A [link](x.md) – dash", "a-link--dash"),
        ("`run_train.sh` & co.", "run_trainsh--co"),
        ("Größe _here_", "größe-here"),
    ],
)
def test_slugs_are_those_of_github(heading: str, slug: str) -> None:
    assert slug_of(heading) == slug


def test_second_heading_of_a_name_is_numbered() -> None:
    assert Page("x.md", "# A\n## B\n### B\n```\n# C\n```\n").anchors == {"a", "b", "b-1"}


def test_links_are_found() -> None:
    text = 'A [b](c.md#d "t"), ![e](f.png), `[no](g)` [![h](i.png)](j.md)\n[k]: l.md\n<img src="m.png" width="3">\n'
    assert sorted(link for _, link in Page("x.md", text).links()) == [
        "c.md#d",
        "f.png",
        "i.png",
        "j.md",
        "l.md",
        "m.png",
    ]


# -------------------------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_shell_block_is_valid(block: Block) -> None:
    assert syntax_error(block) == ""


@pytest.mark.parametrize("block", TESTED, ids=lambda block: block.id)
def test_commands_of_a_block_are_all_seen(block: Block) -> None:
    commands, complaint = commands_of(block)
    assert complaint == "" and missed(block, commands) == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.id)
def test_command_is_accepted_to_its_last_word(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of(PAGES[command.page]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        check_command(command.words)
    except SystemExit as end:  # after --help
        assert not end.code


@pytest.mark.parametrize(
    "words",
    [
        "python train.py --data.train_dataset=a --data.val_dataset=b --training.epochz=3",
        "python train.py --data.train_dataset=a",
        "bash run_train.sh --config-file configs/no.yaml …",
        "bash run_train.sh … --model.arc=…",
        "bash run_eval.sh name --data.val_dataset=x --eval.norms=L3",
        "bash run_slurm.sh … --dist.port=99999",
        "bash run_ablation.sh configs/ablations/grid_cifar10_cpu.yaml --job 2x",
        "bash run_ablation.sh configs/ablations/grid_cifar10_cpu.yaml --training.epochz=2",
        "bash run_tests.sh tests/nowhere",
        "torchrun --nnode-s=2 train.py …",
        "sbatch --array=1-2 --wrap 'bash run_ablation.sh no.yaml'",
        "python -m zoo shows x",
        "python -m data.prepare a b --splits train",
        "python -m ablation.subset a b",
        "python -m tools.flags --chek",
        "python -m benchmarks.loader",
        "python -m benchmarks.nothing",
        "python -m something",
        "python other.py",
        "bash node.sh",
        "frobnicate",
    ],
)
def test_wrong_commands_are_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    with pytest.raises((Unknown, UserError, ValueError, SystemExit)):
        check_command(shlex.split(words))


@pytest.mark.parametrize(
    "words",
    [
        "bash run_train.sh",
        "bash run_train.sh --help",
        "python train.py --config-file configs/own_data.yaml … --model.num_classes=… --check",
        "python train.py --config-file=runs/placeholder/params.json --training.resume=none",
        "torchrun --standalone --nproc-per-node=8 train.py …",
        "python runner_aa_eval.py …",
        "bash run_slurm.sh --config-file configs/vit_s.yaml --data.train_dataset=…",
        "python runner_aa_eval.py convnext_base_cvst --data.val_dataset=x",
        "bash run_eval.sh --eval.models=networks.yaml …",
        "bash run_ablation.sh configs/ablations/grid_cifar10_cpu.yaml --data.train_dataset=… --data.val_dataset=…",
        "python -m benchmarks.train_step --arch vit_s …",
        "git clone placeholder",
    ],
)
def test_right_commands_are_accepted(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    try:
        check_command(words.split())
    except SystemExit as end:
        assert not end.code


def test_commands_are_read_as_bash_reads_them(tmp_path: Path) -> None:
    text = (
        "cd project && NODES=2 bash run_slurm.sh \\\n    --a=1 '--b=x y'   # run_train.sh\n"
        'flags=(--c="1 2" …)\n'
        'folder=$(python train.py --where "${flags[@]}") || exit\n'
        "for i in 1 2; do ./run_train.sh --d=runs/<run> & done; wait\n"
    )
    block = Block("x.md", 10, "bash", text, "")
    assert syntax_error(block) == ""
    commands, complaint = recorded(block, tmp_path)
    assert [(command.line, *command.words) for command in commands] == [
        (10, "cd", "project"),
        (10, "bash", "run_slurm.sh", "--a=1", "--b=x y"),
        (13, "python", "train.py", "--where", "--c=1 2", "…"),
        (14, "run_train.sh", "--d=runs/placeholder"),
    ]
    assert complaint == "" and missed(block, commands) == []


def test_files_that_a_block_writes_are_there(tmp_path: Path) -> None:
    recorded(Block("x.md", 1, "bash", "cat > a.yaml <<'EOF'\na: $x\nb\nEOF\n", ""), tmp_path)
    assert (tmp_path / "a.yaml").read_text() == "a: $x\nb\n"


def test_commands_that_bash_does_not_reach_are_reported(tmp_path: Path) -> None:
    block = Block("x.md", 1, "bash", "if false; then\n    python train.py\nfi\n", "")
    commands, _ = recorded(block, tmp_path)
    assert missed(block, commands) == ["train.py"]


def test_unknown_command_is_named() -> None:
    assert "frobnicate" not in FOREIGN
    with pytest.raises(Unknown, match="frobnicate"):
        check_command(["frobnicate"])


def test_marks_of_blocks() -> None:
    text = "<!-- run -->\n```bash\na\n```\n- item\n  <!-- no test: ssh -->\n  ```bash\n  b\n  ```\n\n```bash\nc\n```\n"
    blocks = Page("x.md", text).blocks
    assert [(block.mark, block.text, block.line) for block in blocks] == [
        ("run", "a\n", 3),
        ("no test: ssh", "b\n", 8),
        ("", "c\n", 12),
    ]


@each_page
def test_comments_above_blocks_are_marks(page: Page) -> None:
    for block in page.blocks:
        above = page.lines[block.line - 3] if block.line > 2 else ""
        assert block.mark or not re.match(r"\s*<!--\s*(run|no.?test)", above), (
            f"{block.id}: a mark that is not read: {above}"
        )


@each_page
def test_python_and_yaml_blocks_can_be_read(page: Page) -> None:
    for block in page.blocks:
        if block.language == "python":
            ast.parse(block.text)
        elif block.language in ("yaml", "json"):
            yaml.safe_load(block.text)


# ----------------------------------------------------------------------------------------------------------- tests
@functools.cache
def names_of_tests() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r"^ *(?:async )?def (test_\w+)", text, re.MULTILINE)}


@each_page
def test_named_tests_exist(page: Page) -> None:
    wrong = []
    for line, span in page.code_spans():
        path, _, name = span.partition("::")
        if re.fullmatch(r"tests/[\w./-]*", path) and not (PROJECT / path).exists():
            wrong.append(f"{page.name}:{line}: {path}")
        name = name or span
        if re.fullmatch(r"test_\w+(…|\.\.\.)?", name):
            prefix = name.rstrip("….")
            if not (
                name in names_of_tests() or (prefix != name and any(n.startswith(prefix) for n in names_of_tests()))
            ):
                wrong.append(f"{page.name}:{line}: {name}")
    assert not wrong


# --------------------------------------------------------------------------------------------------------- lengths
def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].lines) <= README_LINES


@each_page
def test_lines_are_short(page: Page) -> None:
    if page.name in GENERATED:
        return
    exempt = page.comment_lines()
    prose = [(n, line) for n, line in page.prose if n not in exempt and not line.lstrip().startswith("|")]
    assert [f"{page.name}:{n}: {len(line)} characters" for n, line in prose if len(line) > LONGEST] == []


def test_page_of_flags_is_current() -> None:
    assert is_current(PAGE), "run `python -m tools.flags`"


# ------------------------------------------------------------------------------------------------------------- run
LEFT_OUT = (".git", ".venv*", "runs", "images", "checkpoints", "__pycache__", ".pytest_cache", ".ruff_cache", "site")


def run_blocks(page: Page, folder: Path) -> str:
    """Run the marked blocks of a page in one shell, in a copy of the project with a small data set; returns the output.

    The data set is images/ with train/ and val/: digits, ten classes, 40 and 10 images.
    """
    project = folder / "project"
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for split, count in (("train", 4), ("val", 1)):
        write_subset("digits", project / "images" / split, split=split, root="", per_class=count, skip=0)
    write_shown_files(page, project)
    script = "\n".join(["set -euo pipefail", *(b.text for b in page.shell_blocks if b.mark == "run")])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, f"{page.name}: status {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def test_marked_blocks_run_in_order_in_one_shell(tmp_path: Path) -> None:
    text = "<!-- run -->\n```bash\nx=1; ls images\n```\n\n```bash\nfalse\n```\n<!-- run -->\n```bash\necho x=$x\n```\n"
    assert run_blocks(Page("x.md", text), tmp_path).split() == ["train", "val", "x=1"]


@pytest.mark.slow
@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.name)
def test_marked_blocks_run(page: Page, tmp_path: Path) -> None:
    run_blocks(page, tmp_path)


# ------------------------------------------------------------------------------------------------------------ site
class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which reads Python's names in mkdocs.yml as nothing."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def test_site_lists_each_page_once() -> None:
    site = yaml.load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    listed = [name for entry in site["nav"] for name in (entry.values() if isinstance(entry, dict) else [entry])]
    assert sorted(listed) == sorted(path.name for path in (PROJECT / "docs").glob("*.md"))
