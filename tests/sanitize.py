"""The CUDA suite under compute-sanitizer: ``python tests/sanitize.py [--tool TOOL] [--workers N] [pytest arguments]``.

Each tool (memcheck, racecheck, synccheck unless named) goes over every test marked ``cuda``, in parts, N processes at
a time; tests marked ``large`` come last, one process for all of them. Only kernels of this library are instrumented.
Exits with 1 if a tool found anything or a test failed, and says what; all that a process printed stays in ``--out``.

Every launch is waited for: else a tool keeps what it knows of each in the GPU's memory, tens of gigabytes of it. A
capture of a CUDA graph allows neither that nor what a tool does around a launch: tests marked ``captures`` are left
out, and so are those that measure memory, where the tools show.

Racecheck and cuBLAS's Hopper kernels do not survive side by side, whether it instruments them or leaves them alone:
under it the library's products go by float64, which has other kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

TOOLS = ("memcheck", "racecheck", "synccheck")
ARGUMENTS = {"racecheck": ("--plain-products",)}
FOUND, NO_TESTS = 99, 5  # exit statuses: the tool's when it found something, pytest's when it had nothing to run
PARTS, LARGE = "cuda and not large and not captures and not memory", "cuda and large"


@dataclass
class Run:
    """What a tool said about a part of the tests."""

    tool: str
    part: str
    log: Path
    passed: int
    failed: int
    found: str
    seconds: float

    @property
    def clean(self) -> bool:
        return not self.failed and self.found.startswith("0 ") and "status" not in self.found

    def why(self) -> list[str]:
        """The first lines of the log that say what is wrong."""
        lines = self.log.read_text(errors="replace").splitlines()
        wrong = re.compile(r"=+ .*(Error|Invalid|hit|hazard|Barrier)|E  +\S|FAILED tests")
        return list(dict.fromkeys(line.strip() for line in lines if wrong.match(line)))[:6]


def count(text: str, word: str) -> int:
    """The number before ``word`` in pytest's last line, ``3 failed, 20 passed, 1 skipped in 12.00s``."""
    lines = re.findall(r"^(?:=+ )?(\d+ [a-z].*) in [\d.]+s", text, re.MULTILINE)
    found = re.search(rf"(\d+) {word}\b", lines[-1] if lines else "")
    return int(found[1]) if found else 0


def run(tool: str, part: str, mark: str, out: Path, arguments: list[str]) -> Run:
    """``tool`` over the tests that ``mark`` and ``arguments`` select."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += ["--report-api-errors", "no", "--force-blocking-launches", "--kernel-name", "kns=fxfuse"]
    command += [sys.executable, "-m", "pytest", "-m", mark, "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [*ARGUMENTS.get(tool, ()), *arguments]
    log, started = out / f"{tool}.{part}.log", time.monotonic()
    with log.open("wb") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    text = log.read_text(errors="replace")
    failed = count(text, "failed") + count(text, "errors?")
    said = re.findall(r"SUMMARY: (\d+ (?:errors?|hazards?)[^\n]*)", text)
    found = said[0] if said else "no summary"
    if status not in (0, FOUND, NO_TESTS) and not failed:
        found += f", status {status}"
    return Run(tool, part, log, count(text, "passed"), failed, found, time.monotonic() - started)


def main() -> int:
    """Runs the tools one after another; 0 if none of them found anything and every test passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    most = min(6, os.cpu_count() or 1)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be given again (default: all)")
    parser.add_argument("--workers", type=int, default=most, help="processes at a time (default %(default)s)")
    parser.add_argument("--parts", type=int, default=4 * most, help="parts of the tests (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/sanitize"), help="logs (default %(default)s)")
    known, arguments = parser.parse_known_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer comes with the CUDA toolkit; put it on PATH")
    known.out.mkdir(parents=True, exist_ok=True)
    tools, n, runs = known.tool or TOOLS, known.parts, []
    for tool in tools:
        with ThreadPoolExecutor(known.workers) as pool:
            parts = [
                pool.submit(run, tool, f"{i + 1}-of-{n}", PARTS, known.out, [f"--part={i}/{n}", *arguments])
                for i in range(n)
            ]
        runs += [part.result() for part in parts]
        runs.append(run(tool, "large", LARGE, known.out, arguments))
    rows = [(r.tool, r.part, r.passed, r.failed, r.found, r.seconds) for r in runs]
    print(tabulate(rows, ("tool", "part", "passed", "failed", "found", "seconds"), floatfmt=".0f"))
    bad = [r for r in runs if not r.clean]
    for r in bad:
        print(f"{r.log}:", *r.why(), sep="\n    ")
    passed = sum(r.passed for r in runs)
    print(f"{', '.join(tools)}: {passed} tests passed; {len(bad)} of {len(runs)} runs found something ({known.out})")
    return 1 if bad or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
