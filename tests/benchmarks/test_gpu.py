"""The command that measures everything on a GPU: it ends, keeps what it has, and its files are read back by the docs."""

from __future__ import annotations

import json

import pytest

import benchmarks.gpu as gpu
from benchmarks.gpu import Part, parse, plan, run_all
from tools.measured import PAGE, RESULTS, page, section

WRITES = (
    "import json, sys, time; "
    "json.dump({'rows': [{'name': 'found', 'figure': 2.0, 'unit': 's', 'target': None, 'ok': None, 'spread': None, 'note': ''}]}, "
    "open(sys.argv[-1], 'w'))"
)


def results(tmp_path, monkeypatch, *parts: Part, minutes: float = 1.0) -> tuple[dict, str]:
    monkeypatch.setattr(gpu, "plan", lambda **_: list(parts))
    assert run_all(parse(["--minutes", str(minutes), "--out", str(tmp_path / "out")])) == 0
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    return content, (tmp_path / "out" / "table.md").read_text()


def test_a_part_that_fails_hangs_or_writes_nothing_costs_only_itself(tmp_path, monkeypatch, capfd):
    content, table = results(
        tmp_path,
        monkeypatch,
        Part("hangs", 2, ["-c", WRITES + "; time.sleep(60)"]),
        Part("fails", 20, ["-c", "raise ValueError('no kernel image')"]),
        Part("refuses", 20, ["-c", "import sys; print('error: no compiler'); sys.exit(2)"]),
        Part("works", 20, ["-c", WRITES]),
    )
    assert [part["part"] for part in content["parts"]] == ["hangs", "fails", "refuses", "works"]
    assert [part["reason"] for part in content["parts"]] == [
        "out of time after 2 s",
        "exit status 1: ValueError: no kernel image",
        "exit status 2: error: no compiler",
        "",
    ]
    assert [len(part["rows"]) for part in content["parts"]] == [1, 0, 0, 1]
    assert table.count("| found ") == 2 and "no kernel image" in table and table in capfd.readouterr().out
    assert content["trial"] == (not gpu.torch.cuda.is_available()) and content["versions"]["torch"]


def test_no_part_begins_without_time_left(tmp_path, monkeypatch):
    content, table = results(tmp_path, monkeypatch, Part("late", 20, ["-c", WRITES]), minutes=0.1)
    assert content["parts"] == [{"part": "late", "seconds": 0.0, "reason": "no time left", "rows": []}]
    assert "no time left" in table


def test_figures_of_an_earlier_run_do_not_count(tmp_path, monkeypatch):
    results(tmp_path, monkeypatch, Part("part", 20, ["-c", WRITES]))
    content, _ = results(tmp_path, monkeypatch, Part("part", 20, ["-c", "raise SystemExit(3)"]))
    assert content["parts"][0]["rows"] == []


@pytest.mark.parametrize(
    "code, figure, note",
    [
        ("def test_a(): pass", 1.0, "1 passed"),
        ("def test_a(): assert False", 0.0, "1 failed"),
        ("import pytest\ndef test_a(): pytest.skip('needs a GPU')", None, "needs a GPU"),
    ],
)
def test_a_part_of_tests_is_one_figure(code, figure, note, tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(code)
    command = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path / "test_it.py")]
    content, _ = results(tmp_path, monkeypatch, Part("tests", 60, command))
    (found,) = content["parts"][0]["rows"]
    assert found["figure"] == figure and note in found["note"]


def test_the_most_wanted_parts_come_first():
    names = [part.name for part in plan(quick=False, archs=["vit_s", "convnext_tiny", "vit_b", "convnext_base"])]
    assert names[:6] == ["rates", "tests", "step_vit_s", "step_convnext_tiny", "step_vit_b", "step_convnext_base"]
    assert names[-4:] == ["augmentation", "autoattack", "resume", "two_ranks"]
    first = plan(quick=False, archs=["vit_s", "convnext_tiny"])[:4]
    assert sum(part.limit for part in first) <= 7.9 * 60  # of 8 minutes


def test_the_docs_have_the_figures_of_the_results():
    text = PAGE.read_text()
    assert text == page(text, RESULTS)


def test_the_docs_read_back_what_the_command_writes(tmp_path, monkeypatch):
    step = "[{'name': n, 'figure': f, 'unit': '', 'target': None, 'ok': None, 'spread': None, 'note': ''} for n, f in "
    step += "[('images_per_second_published_eager_vit_s', 900.0), ('images_per_second_compiled_reuse_vit_s', 2000.0), "
    step += "('time_ratio_compiled_reuse_vit_s', 0.45), ('mfu_compiled_reuse_vit_s', 0.41), "
    step += "('peak_memory_compiled_reuse_vit_s', 5120.0)]]"
    code = f"import json, sys; json.dump({{'rows': {step}}}, open(sys.argv[-1], 'w'))"
    results(
        tmp_path,
        monkeypatch,
        Part("step_vit_s", 20, ["-c", code]),
        Part("rates", 20, ["-c", WRITES]),
        Part("autoattack", 20, ["-c", "raise SystemExit('no compiler')"]),
    )
    text = section(tmp_path / "out" / "gpu.json")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["vit_s", "published eager", "900", "", "", ""] in lines
    assert ["vit_s", "compiled reuse", "2000", "0.45", "41%", "5.0 GiB"] in lines
    assert ["found", "2", "s", ""] in lines and "- autoattack: exit status 1: no compiler" in text
    assert "Not measured yet" in section(tmp_path / "none.json")


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    """Every part is measured or has its reason."""
    assert run_all(parse(["--quick", "--minutes", "9", "--out", str(tmp_path), "--archs", "convnext_micro"])) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    for part in content["parts"]:
        assert part["rows"] and not part["reason"], part
        assert all(row["figure"] is not None or row["note"] for row in part["rows"]), part
    assert content["trial"] and "| vit" not in section(tmp_path / "gpu.json")
    assert "| convnext_micro" in section(tmp_path / "gpu.json")
