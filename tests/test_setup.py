"""Set-up and launchers: checks of installed packages, installation, and started programs.

The launchers run in a copy of the project's shell scripts, in a folder with a space in its name. A stub replaces Python: it
records its calls, and its files and environment variables control its behaviour. Nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.check_requirements import main, read_requirements, unmet_requirements

PROJECT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12"]
SYSTEM_PATH = "/usr/bin:/bin"

# One test process per core, plus one.
SPREAD = ["-n", str(min(len(os.sched_getaffinity(0)) + 1, 4)), "--dist", "loadfile", "--no-loadscope-reorder"]
SHELL_FILES = ["setup_env.sh", "run_train.sh", "run_eval.sh", "run_ablation.sh", "run_tests.sh"]

# Arguments are recorded with one call per line, separated by "|". A stub outside .venv meets the requirements if
# the file <itself>.meets exists; a stub inside, if its pip has written .venv/installed. `-m venv` copies it there.
STUB = """#!/usr/bin/env bash
set -eu
(IFS='|'; printf '%s\\n' "$*" >> "$STUB_LOG")
here=$(dirname -- "$0")
case "$*" in
    "-m common.check_requirements"*)
        if [ -e "$0.meets" ] || [ -e "$here/../installed" ]; then exit 0; fi
        echo "torch is not installed" >&2; exit 1 ;;
    "-c import ensurepip"*) exit "${STUB_CANNOT_MAKE_VENV:-0}" ;;
    "-c from common.gpus import"*) [ -z "${STUB_GPUS_FAIL:-}" ] || exit 1; echo "${STUB_GPUS:-0}" ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version") ;;
    "-m pip install"*)
        sleep "${STUB_PIP_SECONDS:-0}"
        if [ -n "${STUB_PIP_FAILS:-}" ]; then echo "ERROR: no connection"; exit 1; fi
        touch .venv/installed ;;
    */train.py*) pwd > "$STUB_LOG.pwd"; exit "${STUB_TRAIN:-0}" ;;
esac
"""


class Project:
    """A copy of the shell scripts and a Python stub that meets the requirements or not."""

    def __init__(self, folder: Path, *, meets: bool = True) -> None:
        self.root = folder / "a project"
        self.root.mkdir()
        for name in SHELL_FILES:
            shutil.copy(PROJECT / name, self.root)
        self.python = folder / "my python"
        self.python.write_text(STUB)
        self.python.chmod(0o755)
        self.meets = Path(f"{self.python}.meets")
        if meets:
            self.meets.touch()
        self.log = folder / "log"
        self.bin = folder / "bin"  # the only folder on the PATH besides the system's
        self.bin.mkdir()

    def command(self, name: str, content: str) -> None:
        """Put an executable on the PATH."""
        path = self.bin / name
        path.write_text(content)
        path.chmod(0o755)

    def start(self, script: str, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start a launcher from another folder, with an environment that inherits nothing from the caller."""
        env = {
            "PATH": f"{self.bin}:{SYSTEM_PATH}",
            "PYTHON": str(self.python),
            "STUB_LOG": str(self.log),
            **env,
        }
        return subprocess.Popen(
            ["bash", str(self.root / script), *args],
            cwd=self.bin,
            env={name: value for name, value in env.items() if value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *args, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        """Return the arguments of all calls of the stub so far, except calls that only query its state."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        asks = ("-m|common.check_requirements", "-c|", "-m|pip|--version")
        return [line.replace(f"{self.root}/", "<root>/").split("|") for line in lines if not line.startswith(asks)]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def bare(tmp_path: Path) -> Project:
    """Return a project whose Python has no packages."""
    return Project(tmp_path, meets=False)


# Checks of installed packages


def install(folder: Path, name: str, metadata: str | None) -> None:
    info = folder / f"{name}.dist-info"
    info.mkdir()
    if metadata is not None:
        (info / "METADATA").write_text(metadata)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install fake distributions: 1.5, a vendor's pre-release of 2.7, and an incomplete one."""
    install(tmp_path, "fake_lib-1.5", "Metadata-Version: 2.1\nName: Fake.Lib\nVersion: 1.5\n")
    install(tmp_path, "fakevendor-2.7.0a0+x1", "Metadata-Version: 2.1\nName: fakevendor\nVersion: 2.7.0a0+x1\n")
    install(tmp_path, "fakebroken-1.0", None)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    "line",
    [
        "fake-lib",
        "Fake_Lib>=1.5",
        "fake.lib>=1.2,<2",
        'fake-lib>=9 ; python_version < "3.0"',
        'fake-missing ; python_version < "3.0"',
        "fakevendor>=2.6",
    ],
)
def test_requirement_is_met(line: str) -> None:
    assert unmet_requirements([line]) == []


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("fake-missing", "fake-missing is not installed"),
        ("fakebroken", "fakebroken is not installed"),
        ("fake-lib>=1.10", "fake-lib 1.5 is installed, >=1.10 is needed"),
        ("fake-lib<1.5", "fake-lib 1.5 is installed, <1.5 is needed"),
        ('fake-lib>=2 ; python_version >= "3.0"', "fake-lib 1.5 is installed, >=2 is needed"),
        ("fakevendor>=2.7", "fakevendor 2.7.0a0+x1 is installed, >=2.7 is needed"),
    ],
)
def test_requirement_is_not_met(line: str, problem: str) -> None:
    assert unmet_requirements(["fake-lib", line]) == [problem]


def test_pips_packaging_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert unmet_requirements(["pytest>=1", "pytest>=9999"])[0].endswith(">=9999 is needed")
    monkeypatch.setitem(sys.modules, "pip._vendor.packaging.requirements", None)
    assert unmet_requirements(["pytest>=1"]) == ["neither packaging nor pip is installed"]


def test_comments_and_empty_lines_are_no_requirements(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# a comment\n\nnumpy>=1  # why\npillow<13\n")
    assert read_requirements(path) == ["numpy>=1", "pillow<13"]


def test_check_reports_and_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("pytest\n")
    assert main(path) == 0
    path.write_text("pytest\nno-such-package-a\nno-such-package-b\n")
    assert main(path) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "no-such-package-a is not installed\nno-such-package-b is not installed\n"


def test_check_does_not_import_the_checked_packages() -> None:
    code = """
import sys
from pathlib import Path
from common.check_requirements import main

main(Path("requirements.txt"))
print(sorted({"torch", "numpy", "timm", "PIL"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Installation


def test_this_python_meets_the_requirements() -> None:
    assert unmet_requirements(read_requirements(PROJECT / "requirements.txt")) == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_tested_version(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}

    def applying(name: str) -> list[Requirement]:
        parsed = [Requirement(line) for line in read_requirements(PROJECT / name)]
        return [r for r in parsed if r.marker is None or r.marker.evaluate(environment)]

    pins: dict[str, str] = {}
    for constraint in applying("constraints.txt"):
        (specifier,) = constraint.specifier
        assert specifier.operator == "==", constraint
        assert canonicalize_name(constraint.name) not in pins, f"{constraint.name} is pinned twice for {python}"
        pins[canonicalize_name(constraint.name)] = specifier.version
    for requirement in applying("requirements.txt"):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no version in constraints.txt for Python {python}"
        assert requirement.specifier.contains(pin), f"{requirement} excludes the tested version {pin}"


def test_python_that_meets_the_requirements_is_used_as_it_is(project: Project) -> None:
    result = project.run("setup_env.sh")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{project.python}\n", "")
    assert not list(project.root.glob(".venv*"))


def test_python_may_be_a_command_or_a_relative_path(project: Project) -> None:
    project.command("python-x", STUB)
    (project.bin / "python-x.meets").touch()
    assert project.run("setup_env.sh", PYTHON="python-x").stdout == f"{project.bin}/python-x\n"
    assert Path(project.run("setup_env.sh", PYTHON="../my python").stdout.strip()).samefile(project.python)


def test_active_python_is_used_if_it_meets_the_requirements(project: Project) -> None:
    project.command("python3", STUB)
    (project.bin / "python3.meets").touch()
    assert project.run("setup_env.sh", PYTHON="").stdout == f"{project.bin}/python3\n"


def test_python_that_does_not_exist_is_an_error(project: Project) -> None:
    result = project.run("run_train.sh", PYTHON="/no/such/python")
    assert result.returncode == 2
    assert "PYTHON=/no/such/python" in result.stderr
    assert project.calls() == []


def test_venv_is_made_once_and_then_used(bare: Project) -> None:
    venv_python = f"{bare.root}/.venv/bin/python"
    first = bare.run("setup_env.sh")
    assert (first.returncode, first.stdout) == (0, f"{venv_python}\n"), first.stderr
    made, installed = bare.calls()
    assert made == ["-m", "venv", "--clear", ".venv"]
    assert installed[:3] == ["-m", "pip", "install"]
    assert installed[-4:] == ["-r", "requirements.txt", "-c", "constraints.txt"]
    assert "torch is not installed" in first.stderr
    assert "installing" in first.stderr

    second = bare.run("setup_env.sh")
    assert (second.returncode, second.stdout) == (0, f"{venv_python}\n")
    assert "installing" not in second.stderr
    assert len(bare.calls()) == 2


def test_newest_working_python_makes_the_venv(bare: Project) -> None:
    bare.command("python3.12", "#!/bin/sh\nexit 127\n")  # such as a version manager's placeholder
    bare.command("python3.11", STUB)
    for older in ("python3.10", "python3"):
        bare.command(older, STUB.replace("$STUB_LOG", "$STUB_LOG.older"))
    result = bare.run("run_tests.sh", PYTHON="")
    assert result.returncode == 0, result.stderr
    assert "venv" not in Path(f"{bare.log}.older").read_text()
    assert [call[:2] for call in bare.calls()] == [["-m", "venv"], ["-m", "pip"], ["-m", "pytest"]]


def test_changed_requirements_are_installed_into_the_venv_in_place(bare: Project) -> None:
    bare.run("setup_env.sh")
    (bare.root / ".venv/installed").unlink()
    assert bare.run("setup_env.sh").returncode == 0
    assert [call[1] for call in bare.calls()] == ["venv", "pip", "pip"]


def test_python_that_cannot_make_a_venv_is_an_error(bare: Project) -> None:
    result = bare.run("run_train.sh", STUB_CANNOT_MAKE_VENV="1")
    assert result.returncode == 2
    assert "3.10, 3.11 or 3.12" in result.stderr
    assert bare.calls() == [["--version"]]


def test_failed_installation_is_reported_and_tried_again(bare: Project) -> None:
    failed = bare.run("run_train.sh", STUB_PIP_FAILS="1")
    assert failed.returncode == 1
    assert "ERROR: no connection" in failed.stderr
    assert "the installation failed" in failed.stderr
    assert all(call[0] == "-m" for call in bare.calls()), "something was launched"
    assert bare.run("run_train.sh").returncode == 0
    assert bare.calls()[-1] == ["<root>/demo.py"]


def test_interrupted_installation_restarts_from_scratch(bare: Project) -> None:
    process = bare.start("setup_env.sh", STUB_PIP_SECONDS="60")
    wait_for(lambda: any(call[1] == "pip" for call in bare.calls()))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # Even if the check itself would pass: packages that pip had not reached yet may be missing.
    (bare.root / ".venv/installed").touch()
    assert bare.run("setup_env.sh").returncode == 0
    assert [call[1] for call in bare.calls()] == ["venv", "pip", "venv", "pip"]


def test_starts_at_the_same_time_install_once(bare: Project) -> None:
    starts = [bare.start("run_train.sh", STUB_PIP_SECONDS="1") for _ in range(3)]
    for start in starts:
        out, err = start.communicate(timeout=60)
        assert start.returncode == 0, out + err
    assert sorted(call[:2] for call in bare.calls()) == [["-m", "pip"], ["-m", "venv"], *[["<root>/demo.py"]] * 3]


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "condition not true in time"
        time.sleep(0.02)


# Started programs


def shell_scripts() -> list[Path]:
    return [*sorted(PROJECT.glob("*.sh")), PROJECT / ".ci/run"]


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.name)
def test_shell_script_parses_and_is_strict(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_ci_script_has_its_run_bit() -> None:
    assert os.access(PROJECT / ".ci/run", os.X_OK)


def launched(project: Project, script: str, *args: str, **env: str) -> list[list[str]]:
    result = project.run(script, *args, **env)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")
    return project.calls()


def test_train_without_arguments_is_the_demo(project: Project) -> None:
    assert launched(project, "run_train.sh") == [["<root>/demo.py"]]


@pytest.mark.parametrize(
    "flags",
    [
        ["--logging.folder=/a b/c", "--lr.lr", "1e-3", "--misc.notes=*", "--misc.notes="],
        ["--help"],
        ["--lr.lr=1", "-h"],
        ["--check", "--lr.lr=1"],
        ["--lr.lr=1", "--where"],
    ],
)
def test_train_starts_train_py_once(project: Project, flags: list[str]) -> None:
    assert launched(project, "run_train.sh", *flags) == [["<root>/train.py", *flags]]


def test_train_passes_the_exit_status_on(project: Project) -> None:
    assert project.run("run_train.sh", "--lr.lr=1", STUB_TRAIN="3").returncode == 3


def several(processes: int, *flags: str) -> list[str]:
    return ["<root>/train.py", *flags, "--training.distributed=1", f"--dist.world_size={processes}"]


def test_ngpu_starts_that_many_processes(project: Project) -> None:
    assert launched(project, "run_train.sh", "--lr.lr=1", NGPU="2") == [several(2, "--lr.lr=1")]


@pytest.mark.parametrize("ngpu", ["0", "-1", "two", "1.5", "2 "])
def test_ngpu_is_checked(project: Project, ngpu: str) -> None:
    result = project.run("run_train.sh", "--lr.lr=1", NGPU=ngpu)
    assert result.returncode == 2
    assert f"NGPU: expected a whole number from 1 on, got '{ngpu}'" in result.stderr
    assert project.calls() == []


ALONE = ["<root>/train.py", "-x"]


@pytest.mark.parametrize(("gpus", "expected"), [("0", ALONE), ("1", ALONE), ("3", several(3, "-x"))])
def test_one_process_per_visible_gpu(project: Project, gpus: str, expected: list[str]) -> None:
    project.command("nvidia-smi", "#!/bin/sh\n")
    assert launched(project, "run_train.sh", "-x", STUB_GPUS=gpus)[-1] == expected


def test_gpus_that_cannot_be_used_are_left_to_train_py(project: Project) -> None:
    project.command("nvidia-smi", "#!/bin/sh\n")
    assert launched(project, "run_train.sh", "-x", STUB_GPUS_FAIL="1")[-1] == ALONE


def test_ngpu_overrides_the_visible_gpus(project: Project) -> None:
    project.command("nvidia-smi", "#!/bin/sh\n")
    assert launched(project, "run_train.sh", "-x", STUB_GPUS="3", NGPU="1")[-1] == ALONE


@pytest.mark.skipif(
    shutil.which("nvidia-smi", path=SYSTEM_PATH) is not None or Path("/dev/nvidiactl").exists(),
    reason="a driver is installed",
)
def test_pytorch_is_not_asked_without_a_driver(project: Project) -> None:
    assert launched(project, "run_train.sh", "-x", STUB_GPUS="3")[-1] == ALONE


@pytest.mark.parametrize(
    ("flags", "n"),
    [
        (["--dist.world_size=2"], 1),
        (["--dist.world_size", "8"], 1),
        (["--dist.world_size=1", "--dist.world_size=2"], 1),
        (["--dist.world_size=1"], 4),
        (["--dist.world_size", "8", "--dist.world_size", "1"], 4),
    ],
)
def test_train_starts_the_processes_that_its_flags_ask_for(project: Project, flags: list[str], n: int) -> None:
    project.command("nvidia-smi", "#!/bin/sh\n")
    expected = ["<root>/train.py", *flags] if n == 1 else several(n, *flags)
    assert launched(project, "run_train.sh", *flags, STUB_GPUS="4")[-1] == expected
    assert launched(project, "run_train.sh", *flags, NGPU="2")[-1] == several(2, *flags)


def test_tests_and_evaluation_pass_arguments_on(project: Project) -> None:
    assert launched(project, "run_tests.sh") == [["-m", "pytest", *SPREAD]]
    chosen = ["tests/attacks", "-k", "a or b"]
    assert launched(project, "run_tests.sh", *chosen)[-1] == ["-m", "pytest", *SPREAD, *chosen]
    assert launched(project, "run_eval.sh", "--eps", "4/255")[-1] == ["<root>/runner_aa_eval.py", "--eps", "4/255"]
    assert launched(project, "run_ablation.sh", "g.yaml", "--check")[-1] == ["-m", "ablation", "g.yaml", "--check"]


def test_evaluation_without_arguments_is_the_demos(project: Project) -> None:
    """Missing networks are trained first."""
    evaluation = ["<root>/runner_aa_eval.py", "--config-file", "<root>/configs/demo_norms.yaml"]
    result = project.run("run_eval.sh")
    assert result.returncode == 0 and "training them first" in result.stderr
    assert project.calls() == [["<root>/demo.py"], evaluation]
    (project.bin / "runs" / "demo").mkdir(parents=True)
    (project.bin / "runs" / "demo" / "networks.yaml").touch()
    assert launched(project, "run_eval.sh")[2:] == [evaluation]


def test_relative_paths_start_where_the_user_stands(project: Project) -> None:
    launched(project, "run_train.sh", "--data.train_dataset=images")
    assert Path(f"{project.log}.pwd").read_text() == f"{project.bin}\n"


def test_ci_runs_all_tests(project: Project) -> None:
    (project.root / ".ci").mkdir()
    shutil.copy(PROJECT / ".ci/run", project.root / ".ci")
    assert launched(project, ".ci/run") == [["-m", "pytest", *SPREAD]]
