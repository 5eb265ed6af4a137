"""Git checks files out with LF under all settings, because bash fails at a CR."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_scripts_have_lf_where_git_writes_crlf(tmp_path: Path) -> None:
    names = ["run_train.sh", ".ci/run", "setup_env.sh", "requirements.txt", "README.md"]
    for name in [*names, ".gitattributes"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git = ["git", "-C", str(tmp_path), "-c", "core.autocrlf=true", "-c", "core.eol=crlf"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    for name in names:
        (tmp_path / name).unlink()
    subprocess.run([*git, "checkout", "--quiet", "--", "."], check=True)
    assert not [name for name in names if b"\r" in (tmp_path / name).read_bytes()]
