"""The command that runs the CUDA suite under compute-sanitizer, with a stand-in for the tool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import draws
import pytest
import sanitize
import sanitizer_part
from conftest import part_of

TOOL = """#!/bin/sh
echo "$@" >> "$HERE/calls"
echo "========= COMPUTE-SANITIZER"
if mv "$HERE/dies" "$HERE/died" 2> /dev/null; then kill -SEGV $$; fi
case "$*" in *--part=0/*) if [ -f "$HERE/slow" ]; then echo $$ > "$HERE/process"; exec sleep 60; fi ;; esac
echo "3 passed, 1 skipped in 0.01s"
case "$*" in *--part=1/*) if [ -f "$HERE/bad" ]; then
    echo "========= Invalid __global__ read of size 4 bytes"
    echo "========= ERROR SUMMARY: 1 error"
    exit 99
fi ;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the stand-in; a file in it says how that behaves: dies, slow (the first part), bad (the second)."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(sanitize, "large_tests", lambda arguments: ("tests/some.py::large",))
    return tmp_path


def calls(here: Path, *arguments: str) -> tuple[int, list[str]]:
    """The command's exit status, and how the tool was called."""
    (here / "calls").write_text("")
    before = signal.getsignal(signal.SIGTERM)
    try:
        sys.argv = ["sanitize.py", "--workers", "1", "--out", str(here / "out"), *arguments]
        status = sanitize.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    return status, (here / "calls").read_text().splitlines()


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_every_part_and_every_large_test_under_each_tool(here, capsys):
    status, called = calls(here)
    assert status == 0 and len(called) == 3 * (4 + 1)
    assert sum("--tool racecheck" in c and "--plain-products" in c for c in called) == 5
    assert sum("--plain-products" in c for c in called) == 5 and all("--under-a-tool" in c for c in called)
    assert all(sum(f"--part={i}/4" in c for c in called) == 3 for i in range(4))
    assert sum(c.endswith("tests/some.py::large") for c in called) == 3
    assert "45 tests passed; 0 of 15 runs found something, 0 are left" in capsys.readouterr().out


def test_tests_that_cannot_be_collected_end_the_command():
    with pytest.raises(SystemExit, match="cannot collect"):
        sanitize.large_tests(["tests/there_is_no_such_file.py"])
    assert sanitize.large_tests(["tests/test_sanitize.py"]) == ()
    assert {t.rpartition("[")[0] for t in sanitize.large_tests(["tests/cuda"])} == {
        "tests/cuda/test_loss_kernels.py::test_each_of_more_elements_than_an_int_counts",
        "tests/cuda/test_loss_kernels.py::test_sums_of_more_elements_than_an_int_counts",
        "tests/cuda/test_matmul_div_sum_scale_cuda.py::test_more_than_2_31_elements",
    }


def test_what_was_found_is_said_and_run_again(here, capsys):
    (here / "bad").touch()
    status, called = calls(here, "--tool", "memcheck")
    said = capsys.readouterr().out
    assert status == 1 and len(called) == 5 and "1 of 5 runs found something" in said
    assert "memcheck 2-of-4: 3 passed, 0 failed, 1 error" in said and "Invalid __global__ read of size 4" in said
    (here / "bad").unlink()
    status, called = calls(here, "--tool", "memcheck", "--resume")
    assert status == 0 and len(called) == 1 and "--part=1/4" in called[0]
    assert "15 tests passed" in capsys.readouterr().out
    status, called = calls(here, "--tool", "memcheck", "--resume")
    assert status == 0 and not called
    status, called = calls(here, "--tool", "memcheck")
    assert status == 0 and len(called) == 5, "without --resume everything runs"


def test_another_source_or_argument_is_another_run(here, monkeypatch, capsys):
    root = here / "project"
    (root / "fxfuse").mkdir(parents=True)
    source = root / "fxfuse" / "a.cu"
    source.write_text("one")
    monkeypatch.setattr(sanitizer_part, "ROOT", root)
    assert calls(here, "--tool", "synccheck")[0] == 0
    assert not calls(here, "--tool", "synccheck", "--resume")[1]
    source.write_text("two")
    assert len(calls(here, "--tool", "synccheck", "--resume")[1]) == 5
    assert len(calls(here, "--tool", "synccheck", "--resume", "-k", "some")[1]) == 5
    assert not calls(here, "--tool", "synccheck", "--resume", "-k", "some")[1]
    (here / "out" / "clean.json").write_text("{")
    assert len(calls(here, "--tool", "synccheck", "--resume")[1]) == 5


def test_the_budget_cuts_off_and_says_what_is_left(here, capsys):
    (here / "slow").touch()
    started = time.monotonic()
    status, _ = calls(here, "--tool", "memcheck", "--budget", "2")
    said = capsys.readouterr().out
    assert status == 1 and time.monotonic() - started < 30
    assert "2 are left (--resume runs them)" in said  # the slow part, and the large test that comes behind the parts
    (here / "slow").unlink()
    status, called = calls(here, "--tool", "memcheck", "--resume")
    assert status == 0 and len(called) == 2 and "3 runs were clean before" in capsys.readouterr().out


def test_a_tool_that_dies_before_the_tests_is_started_again(here, capsys):
    (here / "dies").touch()
    status, called = calls(here, "--tool", "racecheck")
    assert status == 0 and len(called) == 6
    assert "0 of 5 runs found something" in capsys.readouterr().out


def test_nothing_goes_on_behind_a_command_that_was_stopped(here):
    (here / "slow").touch()
    command = [sys.executable, "tests/sanitize.py", "--tool", "memcheck", "--workers", "1", "--out", str(here / "out"),
               "tests/test_sanitize.py"]  # fmt: skip
    process = subprocess.Popen(command, cwd=sanitizer_part.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ((slow := here / "process").exists() and slow.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(60) == 1 and time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(slow.read_text()), 0)


@pytest.mark.parametrize("tests", [0, 1, 5, 24, 168, 4323])
@pytest.mark.parametrize("parts", [1, 2, 7, 104, 5000])
def test_every_test_is_in_one_part(tests, parts):
    items = list(range(tests))
    found = [part_of(items, part, parts) for part in range(parts)]
    assert sorted(item for part in found for item in part) == items
    assert sum(map(bool, found)) >= min(tests, parts) * 11 / 12  # nobody without work


def test_under_a_tool_tests_draw_twice(monkeypatch):
    assert [draws.times(n) for n in (1, 4, 64)] == [1, 4, 64]
    monkeypatch.setattr(draws, "under_a_tool", True)
    assert [draws.times(n) for n in (1, 4, 64)] == [1, 2, 2]
