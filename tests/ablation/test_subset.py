"""Export of parts of a data set as class folders."""

from __future__ import annotations

from pathlib import Path

from ablation.subset import main


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_parts_do_not_overlap_and_keep_the_files_bytes(images: Path, tmp_path: Path) -> None:
    assert main([str(images), str(tmp_path / "a"), "--per-class=2"]) == 0
    assert main([str(images), str(tmp_path / "b"), "--per-class=4", "--skip=2"]) == 0
    assert main([str(images), str(tmp_path / "ab"), "--per-class=6"]) == 0
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert (len(a), len(b)) == (8, 16) and not a & b and files(tmp_path / "ab") == a | b
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in (images / "train").iterdir()}
    originals = {path.read_bytes() for path in (images / "train").rglob("*") if path.is_file()}
    assert {(tmp_path / "a" / name).read_bytes() for name in a} <= originals


def test_images_without_files_become_png(tmp_path: Path) -> None:
    assert main(["digits", str(tmp_path / "digits"), "--per-class=1", "--split=test"]) == 0
    assert len(files(tmp_path / "digits")) == 10 and all(name.endswith(".png") for name in files(tmp_path / "digits"))


def test_rejected_arguments(images: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main([str(images), str(out), "--per-class=7"]) == 2
    assert "expected at least 7" in capsys.readouterr().err
    assert main([str(images), str(out), "--per-class=0"]) == 2
    assert main(["nowhere", str(out), "--per-class=1"]) == 2
    assert not list(tmp_path.iterdir())
    out.mkdir()
    assert main([str(images), str(out), "--per-class=1"]) == 2
    assert "exists already" in capsys.readouterr().err
