"""The CUDA suite under compute-sanitizer: ``python tests/sanitize.py [--tool TOOL] [--workers N] [pytest arguments]``.

Each tool (memcheck, racecheck, synccheck unless named) goes over every test marked ``cuda``, dealt out to N processes
side by side; tests marked ``large`` run afterwards, one process for all of them. Only kernels of this library are
instrumented. Exits with 1 if a tool found anything or a test failed, and says where; what each process printed stays in
``--out``.

Racecheck has to instrument cuBLAS's Hopper kernels, too: one of those that it leaves alone does not survive beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = {"racecheck": ("fxfuse", "nvjet")}
FOUND = 99  # the tool's exit status when it found something
MARKS = {"parts": "cuda and not large", "large": "cuda and large"}


@dataclass
class Run:
    """One process: a tool over a part of the tests."""

    tool: str
    name: str
    log: Path
    process: subprocess.Popen[bytes]
    started: float

    def row(self) -> tuple[str, str, int, int, str, float]:
        """Waits for the end: tool, part, tests passed and failed, what the tool says, seconds."""
        status = self.process.wait()
        text = self.log.read_text(errors="replace")
        passed, failed = count(text, "passed"), count(text, "failed") + count(text, "errors?")
        said = re.findall(r"SUMMARY: (\d+ (?:errors?|hazards?)[^\n]*)", text)
        verdict = said[0] if said else f"ended without a summary, status {status}"
        if status not in (0, FOUND, 5) and not failed:  # 5: this part has no tests
            verdict += f", status {status}"
        return self.tool, self.name, passed, failed, verdict, time.monotonic() - self.started


def count(text: str, word: str) -> int:
    """The number before ``word`` in pytest's last line, ``3 failed, 20 passed, 1 skipped in 12.00s``."""
    lines = re.findall(r"^(?:=+ )?(\d+ [a-z].*) in [\d.]+s", text, re.MULTILINE)
    found = re.search(rf"(\d+) {word}\b", lines[-1] if lines else "")
    return int(found[1]) if found else 0


def start(tool: str, name: str, mark: str, out: Path, arguments: list[str]) -> Run:
    """Starts ``tool`` over the tests that ``mark`` and ``arguments`` select."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    for kernel in KERNELS.get(tool, ("fxfuse",)):
        command += ["--kernel-name", f"kns={kernel}"]
    command += [sys.executable, "-m", "pytest", "-m", mark, "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    log = out / f"{tool}.{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    return Run(tool, name, log, process, time.monotonic())


def main() -> int:
    """Runs the tools one after another; 0 if none of them found anything and every test passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    most = min(12, os.cpu_count() or 1)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be given again (default: all)")
    parser.add_argument("--workers", type=int, default=most, help="processes (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/sanitize"), help="logs (default %(default)s)")
    known, arguments = parser.parse_known_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer comes with the CUDA toolkit; put it on PATH")
    known.out.mkdir(parents=True, exist_ok=True)
    tools, n = known.tool or TOOLS, known.workers
    rows = []
    for tool in tools:
        parts = [(f"{i + 1} of {n}", [f"--part={i}/{n}", *arguments]) for i in range(n)]
        runs = [start(tool, name, MARKS["parts"], known.out, selection) for name, selection in parts]
        rows += [run.row() for run in runs]
        rows.append(start(tool, "large", MARKS["large"], known.out, arguments).row())
    print(tabulate(rows, ("tool", "part", "passed", "failed", "found", "seconds"), floatfmt=".0f"))
    bad = [row for row in rows if row[3] or not row[4].startswith("0 ") or "status" in row[4]]
    passed = sum(row[2] for row in rows)
    print(f"{', '.join(tools)}: {passed} tests passed; {len(bad)} of {len(rows)} found something ({known.out})")
    return 1 if bad or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
