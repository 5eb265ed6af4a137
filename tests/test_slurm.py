"""run_slurm.sh: submission, the programs of a job on its nodes, and when a job stops, is requeued or gives up.

The script runs in a copy of the project, in a folder with a space in its name. Stubs replace Slurm's commands and record their
calls. The stub of srun runs its command once per node. Training is a stub too: each start runs the shell lines of the next file
`train.N`. One test uses the real torchrun instead, on two "nodes".
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SYSTEM_PATH = "/usr/bin:/bin"
SEPARATOR = "\x1f"
RECORD = "(IFS=$'\\x1f'; printf '%s\\n' \"$*\" >> \"$LOGS/{name}\")\n"

PYTHON = f"""#!/usr/bin/env bash
set -eu
case "$1" in
    -c) exec {shlex.quote(sys.executable)} -S "$@" ;;
    -m) if [ "$2" = common.check_requirements ]; then exit 0; fi ;;
esac
{RECORD.format(name="python")}
case "$*" in
    *"/train.py --where"*)
        for flag in "$@"; do case $flag in --lr.lr=x) echo "error: lr.lr: x" >&2; exit 2 ;; esac; done
        if [ -e "$LOGS/run" ]; then cat "$LOGS/run"; else printf 'runs/%s\\n' "${{@: -1}}"; fi ;;
    *"/train.py --check"*)
        echo "$RANK,$WORLD_SIZE,$LOCAL_WORLD_SIZE,$CUDA_VISIBLE_DEVICES" >> "$LOGS/check"
        exit "${{STUB_CHECK:-0}}" ;;
    "-m torch.distributed.run"*)
        status() {{
            printf '{{"status": "%s", "step": %s, "reason": "%s", "time": "%s"}}' "$1" "$2" "${{3:-}}" "$(date +%s%N)" \
                > "$RUN/status.json"
        }}
        RUN=$(cat "$LOGS/run"); mkdir -p "$RUN"
        for n in 1 2 3 4 5 6 7 8 9; do
            if [ -e "$LOGS/train.$n" ]; then mv "$LOGS/train.$n" "$LOGS/trained.$n"; . "$LOGS/trained.$n"; fi
        done
        echo "no train.N is left" >&2; exit 99 ;;
esac
"""

SRUN = f"""#!/usr/bin/env bash
set -eu
{RECORD.format(name="srun")}
env > "$LOGS/srun.env"
while [[ $1 == --* ]]; do shift; done
status=0
IFS=,
for node in $SLURM_JOB_NODELIST; do
    SLURMD_NODENAME=$node "$@" & pids="${{pids:-}}${{pids:+,}}$!"
    if [ -z "${{STUB_ALL_NODES:-}}" ]; then break; fi
done
for pid in $pids; do wait "$pid" || status=$?; done
exit "$status"
"""

SBATCH = f"""#!/usr/bin/env bash
{RECORD.format(name="sbatch")}
env -0 > "$LOGS/sbatch.env"
exit "${{STUB_SBATCH:-0}}"
"""

SCONTROL = f"""#!/usr/bin/env bash
{RECORD.format(name="scontrol")}
if [ "$1" = show ]; then tr , '\\n' <<< "$3"; fi
if [ "$1" = requeue ]; then exit "${{STUB_REQUEUE:-0}}"; fi
"""


class Cluster:
    """A copy of the project, and stubs for Slurm and Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        self.root.mkdir()
        for name in ("setup_env.sh", "run_slurm.sh"):
            shutil.copy(PROJECT / name, self.root)
        (self.root / "train.py").touch()
        self.bin, self.logs = folder / "bin", folder / "logs"
        self.bin.mkdir()
        self.logs.mkdir()
        for name, content in {"srun": SRUN, "sbatch": SBATCH, "scontrol": SCONTROL, "my python": PYTHON}.items():
            (self.bin / name).write_text(content)
            (self.bin / name).chmod(0o755)
        self.run_folder = self.root / "runs" / "a run"
        # sbatch's copy of the script.
        self.spooled = folder / "slurm_script"
        shutil.copy(PROJECT / "run_slurm.sh", self.spooled)

    def start(self, script: Path, *args: str, **env: str) -> subprocess.Popen[str]:
        env = {
            "PATH": f"{self.bin}:{SYSTEM_PATH}",
            "PYTHON": str(self.bin / "my python"),
            "LOGS": str(self.logs),
            **env,
        }
        return subprocess.Popen(
            ["bash", str(script), *args],
            cwd=self.bin,
            env={name: value for name, value in env.items() if value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def submit(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return finished(self.start(self.root / "run_slurm.sh", *args, **env))

    def start_job(self, *args: str, trains: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        """Start a job; its n-th start of training runs the n-th shell line."""
        (self.logs / "run").write_text(f"{self.run_folder}\n")
        for n, line in enumerate(trains, start=1):
            (self.logs / f"train.{n}").write_text(line + "\n")
        job = {
            "SLURM_JOB_ID": "123456",
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_GPUS_ON_NODE": "4",
        }
        return self.start(self.spooled, *args, **{**job, **env})

    def job(self, *args: str, trains: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        return finished(self.start_job(*(args or ("--a=b",)), trains=trains, **env))

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of all calls of a stub so far."""
        path = self.logs / name
        if not path.exists():
            return []
        text = path.read_text()
        if name == "srun":  # its arguments include a function of many lines
            return [[name, *part.split(SEPARATOR)] for part in text.split("--kill-on")[1:]]
        if name == "python":
            text = text.replace(f"{self.root}/", "<root>/")
        return [line.split(SEPARATOR) for line in text.splitlines()]

    def torchruns(self) -> list[list[str]]:
        return [call for call in self.calls("python") if call[:2] == ["-m", "torch.distributed.run"]]

    def requeues(self) -> list[list[str]]:
        return [call for call in self.calls("scontrol") if call[0] == "requeue"]

    def sbatch(self) -> tuple[dict[str, str], list[str]]:
        """Return the options of the only submission, and the arguments after them."""
        (call,) = self.calls("sbatch")
        script = call.index(f"{self.root}/run_slurm.sh")
        options = [option.partition("=") for option in call[:script]]
        return {name: value for name, _, value in options}, call[script:]

    def sbatch_env(self) -> dict[str, str]:
        entries = (self.logs / "sbatch.env").read_text().split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def write_status(self, status: str, step: int) -> None:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        (self.run_folder / "status.json").write_text(f'{{"status": "{status}", "step": {step}, "reason": "before"}}')


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "condition not true in time"
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


FLAGS = ["--misc.notes=a b  c", "--data.train_dataset=/data/*", "--misc.notes", "", "--lr.lr=$HOME'\""]
REQUEUED = [["requeue", "Incomplete", "123456"]]


# Submission


def test_submission_has_sensible_options(cluster: Cluster) -> None:
    result = cluster.submit(*FLAGS)
    assert result.returncode == 0, result.stderr
    options, script = cluster.sbatch()
    assert script == [f"{cluster.root}/run_slurm.sh", *FLAGS]
    assert options == {
        "--job-name": "train",
        "--nodes": "1",
        "--ntasks-per-node": "1",
        "--cpus-per-task": "64",
        "--time": "24:00:00",
        "--requeue": "",
        "--open-mode": "append",
        "--signal": "B:USR1@300",
        "--chdir": str(cluster.bin),
        "--export": "ALL",
        "--gres": "gpu:8",
        "--output": f"{cluster.bin}/runs/slurm/%x-%j.out",
    }
    assert (cluster.bin / "runs" / "slurm").is_dir()


def test_every_setting_becomes_an_option(cluster: Cluster) -> None:
    settings = {
        "NODES": "4",
        "GPUS": "2",
        "CPUS": "24",
        "MEM": "200G",
        "TIME": "2-12:00:00",
        "PARTITION": "a100",
        "ACCOUNT": "me",
        "QOS": "long",
        "CONSTRAINT": "a|b",
        "JOB_NAME": "my run",
        "STOP_SECONDS": "600",
        "LOG_DIR": "../logs at 100%",
        "SBATCH_ARGS": "--mail-type=END --comment='two words'",
    }
    result = cluster.submit("-x", **settings)
    assert result.returncode == 0, result.stderr
    options, _ = cluster.sbatch()
    expected = {
        "--nodes": "4",
        "--gres": "gpu:2",
        "--cpus-per-task": "24",
        "--mem": "200G",
        "--time": "2-12:00:00",
        "--partition": "a100",
        "--account": "me",
        "--qos": "long",
        "--constraint": "a|b",
        "--job-name": "my run",
        "--signal": "B:USR1@600",
        "--output": f"{cluster.root.parent}/logs at 100%%/%x-%j.out",
        "--mail-type": "END",
        "--comment": "two words",
    }
    assert {name: options.get(name) for name in expected} == expected
    assert (cluster.root.parent / "logs at 100%").is_dir()


def test_flags_are_checked_as_the_job_will_see_them(cluster: Cluster) -> None:
    cluster.submit(*FLAGS, NODES="2", GPUS="3")
    assert cluster.calls("python") == [["<root>/train.py", "--where", *FLAGS], ["<root>/train.py", "--check", *FLAGS]]
    assert (cluster.logs / "check").read_text() == "0,6,3,\n"


def test_check_of_the_data_can_be_skipped(cluster: Cluster) -> None:
    assert cluster.submit("-x", CHECK="0").returncode == 0
    assert cluster.calls("python") == [["<root>/train.py", "--where", "-x"]]
    assert cluster.calls("sbatch")


@pytest.mark.parametrize(("flag", "env"), [("--lr.lr=x", {}), ("-x", {"STUB_CHECK": "2"})])
def test_wrong_flags_are_not_submitted(cluster: Cluster, flag: str, env: Mapping[str, str]) -> None:
    assert cluster.submit(flag, **env).returncode == 2
    assert not cluster.calls("sbatch")


def test_job_gets_the_settings_and_nothing_of_a_job_around(cluster: Cluster) -> None:
    around = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_MEM_PER_NODE": "5", "SLURM_CONF": "/etc/slurm.conf"}
    assert cluster.submit("-x", GPUS="2", SETUP="module load cuda", **around).returncode == 0
    env = cluster.sbatch_env()
    assert {name for name in env if name.startswith("SLURM_")} == {"SLURM_CONF"}
    assert (env["GPUS"], env["SETUP"], env["RUN_SLURM_ROOT"]) == ("2", "module load cuda", str(cluster.root))
    assert env["PYTHON"] == str(cluster.bin / "my python")


def test_status_of_sbatch_is_passed_on(cluster: Cluster) -> None:
    assert cluster.submit("-x", STUB_SBATCH="7").returncode == 7


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        *[
            ("NODES", value, f"NODES: expected a whole number from 1 on, got '{value}'")
            for value in ("0", "-1", "x", "2 ")
        ],
        ("GPUS", "a[0]", "GPUS: expected a whole number from 0 on, got 'a[0]'"),
        ("CPUS", "0", "CPUS: expected"),
        ("MAX_PARALLEL", "0", "MAX_PARALLEL: expected"),
        ("MAX_RESTARTS", "no", "MAX_RESTARTS: expected"),
        ("MAX_REQUEUES", "-1", "MAX_REQUEUES: expected"),
        ("STOP_SECONDS", "70000", "STOP_SECONDS: expected a whole number from 1 to 65535, got '70000'"),
        *[("TIME", value, f"got '{value}'") for value in ("soon", "1:2:3:4", "-5", "1-", "1-2-3")],
        *[("TIME", value, "more than twice STOP_SECONDS=300") for value in ("0", "10", "9:59", "0:10:00", "0-0:10")],
        ("ARRAY", "none.txt", "ARRAY: expected a file"),
        ("SBATCH_ARGS", "--comment='x", "SBATCH_ARGS: expected options with closed quotes"),
    ],
)
def test_bad_setting_is_one_sentence_and_nothing_is_submitted(
    cluster: Cluster, setting: str, value: str, message: str
) -> None:
    result = cluster.submit("-x", **{setting: value})
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not cluster.calls("sbatch")


@pytest.mark.parametrize("value", ["11", "10:01", "0:10:01", "08:09:09", "1-0", "0-01:00", "1-00:00:00"])
def test_times_are_read_as_slurm_does(cluster: Cluster, value: str) -> None:
    assert cluster.submit("-x", TIME=value, CHECK="0").returncode == 0
    assert cluster.sbatch()[0]["--time"] == value


def test_without_flags_or_slurm_it_says_so(cluster: Cluster) -> None:
    assert "expected train.py's flags" in cluster.submit().stderr
    (cluster.bin / "sbatch").unlink()
    result = cluster.submit("-x")
    assert result.returncode == 2 and "no sbatch here" in result.stderr


def test_help_is_trains(cluster: Cluster) -> None:
    assert cluster.submit("--help").returncode == 0
    assert cluster.calls("python") == [["<root>/train.py", "--help"]]


@pytest.mark.parametrize("flags", [["--training.resume=none"], ["--training.resume", "none"]])
def test_restart_from_scratch_at_every_requeue_is_rejected(cluster: Cluster, flags: list[str]) -> None:
    result = cluster.submit(*flags)
    assert result.returncode == 2 and "--training.resume=" in result.stderr
    assert cluster.submit(*flags, MAX_RESTARTS="0", MAX_REQUEUES="0").returncode == 0
    for later in ("auto", "runs/other"):  # a run that started from another's state resumes from its own
        assert cluster.submit("--training.resume=none", f"--training.resume={later}").returncode == 0


# Arrays

LINES = """# the seeds
--data.seed=1

  --data.seed=2 --misc.notes='two  words; $(touch /tmp/no) *' ""
\t# and one more
--data.seed=3"""


def test_array_has_a_task_a_line(cluster: Cluster) -> None:
    (cluster.bin / "lines.txt").write_text(LINES)
    result = cluster.submit("-x", ARRAY="lines.txt", MAX_PARALLEL="2")
    assert result.returncode == 0, result.stderr
    options, _ = cluster.sbatch()
    assert options["--array"] == "0-2%2"
    assert options["--output"].endswith("/%x-%A_%a.out")
    wheres = [call[2:] for call in cluster.calls("python") if call[1] == "--where"]
    assert wheres == [
        ["-x", "--data.seed=1"],
        ["-x", "--data.seed=2", "--misc.notes=two  words; $(touch /tmp/no) *", ""],
        ["-x", "--data.seed=3"],
    ]
    # Tasks read a copy, so that an edit of the file cannot move a requeued task to another run.
    copy = Path(cluster.sbatch_env()["ARRAY"])
    assert copy.parent == cluster.bin / "runs" / "slurm" and len(copy.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("\n# nothing\n", "has none"),
        ("--a=1\n--b='2\n", "this line: --b='2"),
        ("--a=1\n--lr.lr=x\n", "flags are wrong"),
        ("--a=1 same\n--a=2 same\n", "has two for runs/same"),
    ],
)
def test_bad_array_is_not_submitted(cluster: Cluster, lines: str, message: str) -> None:
    (cluster.bin / "lines.txt").write_text(lines)
    result = cluster.submit("-x", ARRAY="lines.txt")
    assert result.returncode == 2 and message in result.stderr
    assert not cluster.calls("sbatch")


def test_array_task_takes_its_line_and_requeues_itself(cluster: Cluster) -> None:
    (cluster.bin / "lines.txt").write_text(LINES)
    task = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1", "ARRAY": "lines.txt"}
    result = cluster.job("-x", trains=("status stopped 5; exit 1",), **task)
    assert result.returncode == 0, result.stderr
    (torchrun,) = cluster.torchruns()
    flags = ["-x", "--data.seed=2", "--misc.notes=two  words; $(touch /tmp/no) *", ""]
    assert torchrun[torchrun.index("<root>/train.py") + 1 :] == flags
    assert cluster.requeues() == [["requeue", "Incomplete", "77_1"]]


@pytest.mark.parametrize(("task", "array"), [("3", "lines.txt"), ("0", "")])
def test_array_task_without_a_line_is_an_error(cluster: Cluster, task: str, array: str) -> None:
    (cluster.bin / "lines.txt").write_text(LINES)
    result = cluster.job(SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=task, ARRAY=array)
    assert result.returncode == 2 and "ARRAY: " in result.stderr
    assert not cluster.torchruns() and not cluster.requeues()


# Programs of a job

FINISHES = ("status finished 8; exit 0",)


def test_job_starts_torchrun_on_its_node(cluster: Cluster) -> None:
    result = cluster.job(*FLAGS, trains=FINISHES, SLURM_RESTART_COUNT="2")
    assert result.returncode == 0, result.stderr
    assert cluster.torchruns() == [
        [
            "-m",
            "torch.distributed.run",
            "--nnodes=1",
            "--nproc_per_node=4",
            "--max-restarts=0",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:23456",
            "--rdzv_id=123456_2_0",
            "--local_addr=localhost",
            "--rdzv_conf=is_host=true,join_timeout=900,read_timeout=300",
            "<root>/train.py",
            *FLAGS,
        ]
    ]
    assert not cluster.requeues()


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [({}, "300"), ({"STOP_SECONDS": "900"}, "900"), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, "60")],
)
def test_torchrun_waits_for_a_slow_save(cluster: Cluster, settings: Mapping[str, str], seconds: str) -> None:
    train = 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$LOGS/patience"; ' + FINISHES[0]
    assert cluster.job(trains=(train,), **settings).returncode == 0
    assert (cluster.logs / "patience").read_text() == f"{seconds}\n"


def test_several_nodes_meet_on_the_first(cluster: Cluster) -> None:
    nodes = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n7,n8", "STUB_ALL_NODES": "1"}
    trains = ("sleep 0.3; status finished 8; exit 0", "exit 0")
    assert cluster.job(trains=trains, GPUS="8", PORT="5000", **nodes).returncode == 0
    first, second = sorted(cluster.torchruns(), key=lambda call: "is_host=false" in " ".join(call))
    for call, own, is_host in ((first, "n7", "true"), (second, "n8", "false")):
        assert {"--nnodes=2", "--nproc_per_node=8", "--rdzv_endpoint=n7:5000", f"--local_addr={own}"} <= set(call)
        assert any(word.startswith(f"--rdzv_conf=is_host={is_host},") for word in call)
    (srun,) = cluster.calls("srun")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--wait=120", "--export=ALL"} <= set(srun)


def test_tasks_get_all_cpus(cluster: Cluster) -> None:
    cluster.job(trains=FINISHES, SLURM_NTASKS_PER_NODE="1", SLURM_CPUS_PER_TASK="32")
    assert "--cpus-per-task=32" in cluster.calls("srun")[0]
    (cluster.logs / "srun").unlink()
    cluster.job(trains=FINISHES, SLURM_NTASKS_PER_NODE="8", SLURM_CPUS_PER_TASK="4")
    (srun,) = cluster.calls("srun")
    assert "--cpu-bind=none" in srun and not any(word.startswith("--cpus-per-task") for word in srun)


@pytest.mark.parametrize(
    ("gpus", "on_node", "processes"), [("0", "", "1"), ("2", "4", "2"), ("", "4", "4"), ("", "", "gpu")]
)
def test_processes_of_a_node(cluster: Cluster, gpus: str, on_node: str, processes: str) -> None:
    cluster.job(trains=FINISHES, GPUS=gpus, SLURM_GPUS_ON_NODE=on_node)
    assert f"--nproc_per_node={processes}" in cluster.torchruns()[0]


def test_interface_gives_the_addresses(cluster: Cluster) -> None:
    (cluster.bin / "ip").write_text(
        '#!/bin/sh\n[ "$6" = ib0 ] || exit 1\necho "3: ib0    inet 10.1.2.3/16 brd 10.1.255.255 scope global ib0"\n'
    )
    (cluster.bin / "ip").chmod(0o755)
    nodes = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n7,n8"}
    assert cluster.job(trains=FINISHES, IFACE="ib0", **nodes).returncode == 0
    assert {"--rdzv_endpoint=10.1.2.3:23456", "--local_addr=10.1.2.3"} <= set(cluster.torchruns()[0])
    env = (cluster.logs / "srun.env").read_text()
    assert "NCCL_SOCKET_IFNAME=ib0\n" in env and "GLOO_SOCKET_IFNAME=ib0\n" in env
    result = cluster.job(trains=FINISHES, IFACE="ib1", **nodes)
    assert result.returncode == 2 and "got 'ib1'" in result.stderr


def test_setup_runs_in_the_job_and_on_each_node(cluster: Cluster) -> None:
    setup = 'unset_is_fine=$NO_SUCH; export LOADED="a b"; echo "$LOADED" >> "$LOGS/setup"'
    assert cluster.job(trains=('[ "$LOADED" = "a b" ] && status finished 8; exit 0',), SETUP=setup).returncode == 0
    assert (cluster.logs / "setup").read_text() == "a b\n" * 2
    result = cluster.job(SETUP="false")
    assert result.returncode == 1 and "SETUP ended with status 1: false" in result.stderr


def test_project_is_found_or_asked_for(cluster: Cluster) -> None:
    elsewhere = {"SLURM_SUBMIT_DIR": str(cluster.bin)}
    result = cluster.job(trains=FINISHES, **elsewhere)
    assert result.returncode == 2 and "RUN_SLURM_ROOT" in result.stderr
    assert cluster.job(trains=FINISHES, RUN_SLURM_ROOT=str(cluster.root), **elsewhere).returncode == 0


def test_batch_shell_that_inherits_a_step_is_a_job(cluster: Cluster) -> None:
    """sbatch passes SLURM_STEP_ID of an interactive step on to the job."""
    script = f"export SLURM_TASK_PID=$$; exec bash {shlex.quote(str(cluster.spooled))} -x"
    wrapper = cluster.bin / "wrapper"
    wrapper.write_text(script)
    cluster.spooled, spooled = wrapper, cluster.spooled
    assert cluster.job(trains=FINISHES, SLURM_STEP_ID="0").returncode == 0
    assert cluster.torchruns() and not cluster.calls("sbatch")
    assert spooled.exists()


# End of a job


@pytest.mark.parametrize(
    ("line", "status", "requeued"),
    [
        ("status stopped 5 asked; exit 1", 0, True),
        ("status finished 8; exit 0", 0, False),
        ("status finished 8; exit 1", 0, False),
        ("status diverged 5 'the loss is nan'; exit 1", 3, False),
        ("status failed 5 'no such folder'; exit 1", 1, False),
        ("exit 1", 1, False),
        ("status running 0; kill -KILL $$", 1, False),
        ("echo '{' > \"$RUN/status.json\"; exit 1", 1, False),
        ("echo '[1]' > \"$RUN/status.json\"; exit 1", 1, False),
    ],
)
def test_status_file_decides(cluster: Cluster, line: str, status: int, requeued: bool) -> None:
    result = cluster.job(trains=(line,))
    assert result.returncode == status, result.stderr
    assert cluster.requeues() == (REQUEUED if requeued else [])
    assert len(cluster.torchruns()) == 1


@pytest.mark.parametrize("before", ["stopped", "failed", "diverged", "finished", "running"])
def test_status_of_an_earlier_job_is_ignored(cluster: Cluster, before: str) -> None:
    """A start that dies before it writes its status does not count as stopped; otherwise it would be requeued for ever."""
    cluster.write_status(before, 5)
    result = cluster.job(trains=("exit 1",))
    assert result.returncode == 1 and "got no further than step 5" in result.stderr
    assert not cluster.requeues()


def test_finished_run_stays_finished(cluster: Cluster) -> None:
    cluster.write_status("finished", 8)
    assert cluster.job(trains=("exit 0",)).returncode == 0
    assert not cluster.requeues()


def test_crash_after_progress_starts_again_in_the_job(cluster: Cluster) -> None:
    result = cluster.job(trains=("status running 3; exit 1", "status running 6; exit 1", "status finished 8; exit 0"))
    assert result.returncode == 0, result.stderr
    ids = [word for call in cluster.torchruns() for word in call if word.startswith("--rdzv_id")]
    assert ids == [f"--rdzv_id=123456_0_{n}" for n in range(3)]
    assert not cluster.requeues()


def test_crash_that_stays_is_requeued_once_there_was_progress(cluster: Cluster) -> None:
    """It may succeed on another node."""
    cluster.write_status("stopped", 2)
    result = cluster.job(trains=("status running 3; exit 1", "status running 3; exit 1"))
    assert (result.returncode, cluster.requeues()) == (0, REQUEUED)
    assert len(cluster.torchruns()) == 2


def test_restarts_in_a_job_are_bounded(cluster: Cluster) -> None:
    trains = tuple(f"status running {n}; exit 1" for n in range(1, 9))
    assert cluster.job(trains=trains, MAX_RESTARTS="2").returncode == 0
    assert len(cluster.torchruns()) == 3
    assert cluster.requeues() == REQUEUED


def test_no_restart_shortly_before_the_end(cluster: Cluster) -> None:
    end = str(int(time.time()) + 500)
    assert cluster.job(trains=("status running 3; exit 1",), SLURM_JOB_END_TIME=end).returncode == 0
    assert len(cluster.torchruns()) == 1
    assert cluster.requeues() == REQUEUED


def test_crash_loop_ends(cluster: Cluster) -> None:
    cluster.write_status("running", 4)
    result = cluster.job(trains=("status running 4; exit 1",))
    assert result.returncode == 1 and "not requeued" in result.stderr
    assert len(cluster.torchruns()) == 1 and not cluster.requeues()


@pytest.mark.parametrize(("line", "status"), [("status stopped 5; exit 1", 75), ("status running 5; exit 1", 1)])
def test_requeues_are_bounded(cluster: Cluster, line: str, status: int) -> None:
    bounds = {"MAX_REQUEUES": "4", "MAX_RESTARTS": "0"}
    result = cluster.job(trains=(line,), SLURM_RESTART_COUNT="4", **bounds)
    assert result.returncode == status and "MAX_REQUEUES=4" in result.stderr
    assert not cluster.requeues()
    cluster.run_folder.joinpath("status.json").unlink()
    assert cluster.job(trains=(line,), SLURM_RESTART_COUNT="3", **bounds).returncode == 0
    assert cluster.requeues() == REQUEUED


def test_failing_requeue_is_reported(cluster: Cluster) -> None:
    result = cluster.job(trains=("status stopped 5; exit 1",), STUB_REQUEUE="1")
    assert result.returncode == 75 and "could not be requeued" in result.stderr


def test_wrong_flags_end_the_job(cluster: Cluster) -> None:
    assert cluster.job("--lr.lr=x").returncode == 2
    assert not cluster.torchruns() and not cluster.requeues()


# Stopping

OBEYS = 'touch "$LOGS/up"; until [ -e "$RUN/stop" ]; do sleep 0.05; done; rm "$RUN/stop"; sleep 0.3; status stopped 6 asked; exit 1'


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_asks_for_a_stop_and_requeues(cluster: Cluster, number: signal.Signals) -> None:
    job = cluster.start_job("-x", trains=(OBEYS,))
    wait_for((cluster.logs / "up").exists)
    os.kill(job.pid, number)
    result = finished(job)
    assert result.returncode == 0, result.stderr
    assert "stopped at step 6: asked" in result.stderr  # the job waited for the end of training
    assert cluster.requeues() == REQUEUED
    assert not (cluster.run_folder / "stop").exists()


def test_signals_may_come_twice(cluster: Cluster) -> None:
    job = cluster.start_job("-x", trains=(OBEYS,))
    wait_for((cluster.logs / "up").exists)
    for _ in range(2):
        os.kill(job.pid, signal.SIGUSR1)
        time.sleep(0.1)
    assert finished(job).returncode == 0
    assert cluster.requeues() == REQUEUED
    assert not (cluster.run_folder / "stop").exists()


def test_run_that_does_not_obey_is_not_started_again(cluster: Cluster) -> None:
    line = 'touch "$LOGS/up"; until [ -e "$RUN/stop" ]; do sleep 0.05; done; status running 6; exit 1'
    job = cluster.start_job("-x", trains=(line, "status finished 8; exit 0"))
    wait_for((cluster.logs / "up").exists)
    os.kill(job.pid, signal.SIGUSR1)
    assert finished(job).returncode == 0
    assert len(cluster.torchruns()) == 1 and cluster.requeues() == REQUEUED
    assert not (cluster.run_folder / "stop").exists(), "the next start would stop at once"


def test_signal_before_training_starts_requeues_at_once(cluster: Cluster) -> None:
    job = cluster.start_job("-x", SETUP='touch "$LOGS/up"; sleep 1')
    wait_for((cluster.logs / "up").exists)
    os.kill(job.pid, signal.SIGUSR1)
    assert finished(job).returncode == 0
    assert not cluster.torchruns() and cluster.requeues() == REQUEUED


def test_old_stop_file_does_not_stop_a_new_start(cluster: Cluster) -> None:
    cluster.run_folder.mkdir(parents=True)
    (cluster.run_folder / "stop").touch()
    trains = ('[ ! -e "$RUN/stop" ] && status finished 8; exit 0',)
    assert cluster.job(trains=trains).returncode == 0


# With the real torchrun

TRAIN = """
import json, os, sys, time
from pathlib import Path

run = Path("runs/a run")
if "--where" in sys.argv:
    print(run)
    sys.exit()
import torch.distributed as dist
import torch

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
first = dist.get_rank() == 0
def status(status, step):
    if first:
        run.mkdir(parents=True, exist_ok=True)
        (run / "status.json").write_text(json.dumps(dict(status=status, step=step, reason=f"{int(total)} processes")))
status("running", 1)
for _ in range(600):
    stop = torch.tensor(float(first and (run / "stop").exists()))
    dist.all_reduce(stop)
    if stop:
        status("stopped", 7)
        if first:
            (run / "stop").unlink()
        dist.barrier()
        sys.exit(75)
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_two_nodes_meet_stop_and_requeue_with_the_real_torchrun(cluster: Cluster) -> None:
    shutil.copytree(PROJECT / "common", cluster.root / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (cluster.root / "requirements.txt").write_text("torch\n")
    (cluster.root / "train.py").write_text(TRAIN)
    cluster.run_folder = cluster.bin / "runs" / "a run"
    job = cluster.start_job(
        "-x",
        PYTHON=sys.executable,
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="localhost,127.0.0.1",
        STUB_ALL_NODES="1",
        GPUS="1",
        PORT=str(20000 + os.getpid() % 10000),
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        wait_for((cluster.run_folder / "status.json").exists, seconds=50)
    finally:
        os.kill(job.pid, signal.SIGUSR1)
        result = finished(job)
    assert result.returncode == 0, result.stderr
    assert "stopped at step 7: 2 processes" in result.stderr
    assert cluster.requeues() == REQUEUED
