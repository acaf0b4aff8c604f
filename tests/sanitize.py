"""The CUDA suite under compute-sanitizer: ``python tests/sanitize.py [--tool TOOL] [--workers N] [pytest arguments]``.

Each tool (memcheck, racecheck, synccheck unless named) goes over every test marked ``cuda``, in parts, N processes on
each GPU at a time; tests marked ``large`` come last, one process for all of them. Only kernels of this library are
instrumented. Exits with 1 if a tool found anything or a test failed, and says what, each part as it ends; all that a
process printed stays in ``--out``.

Every launch is waited for: else a tool keeps what it knows of each in the GPU's memory, tens of gigabytes of it. Nor
are backtraces of the host asked for: they go through Python's frames, which then keep every tensor that they hold. A
capture of a CUDA graph allows neither waiting nor what a tool does around a launch: tests marked ``captures`` are left
out, and so are those that measure memory, where the tools show.

Nor is a tool left to find out by itself how many mbarriers a block has, and now and then one dies before Python has
started: it is started again, once.

Racecheck and cuBLAS's Hopper kernels do not survive side by side, whether it instruments them or leaves them alone:
under it the library's products go by float64, which has other kernels. Where a kernel orders its shared memory in a way
that the tools cannot follow, FXFUSE_FOLLOWED has a variant of it run that they can.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from tabulate import tabulate

TOOLS = ("memcheck", "racecheck", "synccheck")
ARGUMENTS = {"racecheck": ("--plain-products",)}
BARRIERS = 64  # mbarriers of a block, at least
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


def gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them; at least one, which need not be there."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(max(1, torch.cuda.device_count()))]


def run(tool: str, part: str, mark: str, out: Path, arguments: list[str], gpu: str) -> Run:
    """``tool`` over the tests that ``mark`` and ``arguments`` select, on one GPU."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += ["--report-api-errors", "no", "--force-blocking-launches", "--kernel-name", "kns=fxfuse"]
    command += ["--show-backtrace", "device", "--num-cuda-barriers", str(BARRIERS)]
    command += [sys.executable, "-m", "pytest", "-m", mark, "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [*ARGUMENTS.get(tool, ()), *arguments]
    log, started = out / f"{tool}.{part}.log", time.monotonic()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "FXFUSE_FOLLOWED": "1"}
    for _ in range(2):
        with log.open("wb") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        text = log.read_text(errors="replace")
        if status >= 0 or not all(line.startswith("=") for line in text.splitlines()):
            break
    failed = count(text, "failed") + count(text, "errors?")
    said = re.findall(r"SUMMARY: (\d+ (?:errors?|hazards?)[^\n]*)", text)
    found = said[0] if said else "no summary"
    if status not in (0, FOUND, NO_TESTS) and not failed:
        found += f", status {status}"
    return Run(tool, part, log, count(text, "passed"), failed, found, time.monotonic() - started)


def over(tool: str, n: int, workers: int, out: Path, arguments: list[str]) -> Iterator[Run]:
    """``tool`` over all tests in ``n`` parts, ``workers`` on each GPU at a time; each run as it ends."""
    free: SimpleQueue[str] = SimpleQueue()
    for gpu in gpus() * workers:
        free.put(gpu)

    def one(i: int) -> Run:
        gpu = free.get()
        try:
            return run(tool, f"{i + 1}-of-{n}", PARTS, out, [f"--part={i}/{n}", *arguments], gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(free.qsize()) as pool:
        for part in as_completed([pool.submit(one, i) for i in range(n)]):
            yield part.result()
    yield run(tool, "large", LARGE, out, arguments, gpus()[0])


def main() -> int:
    """Runs the tools one after another; 0 if none of them found anything and every test passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    most = min(6, os.cpu_count() or 1)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be given again (default: all)")
    parser.add_argument("--workers", type=int, default=most, help="processes a GPU at a time (default %(default)s)")
    parser.add_argument("--parts", type=int, help="parts of the tests (default: two for each process)")
    parser.add_argument("--out", type=Path, default=Path("out/sanitize"), help="logs (default %(default)s)")
    known, arguments = parser.parse_known_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer comes with the CUDA toolkit; put it on PATH")
    known.out.mkdir(parents=True, exist_ok=True)
    tools, runs = known.tool or TOOLS, []
    for tool in tools:
        for r in over(tool, known.parts or 2 * known.workers * len(gpus()), known.workers, known.out, arguments):
            runs.append(r)
            print(f"{r.tool} {r.part}: {r.passed} passed, {r.failed} failed, {r.found}, {r.seconds:.0f} s", flush=True)
            if not r.clean:
                print(f"{r.log}:", *r.why(), sep="\n    ", flush=True)
    rows = [
        (tool, sum(r.passed for r in of), sum(r.failed for r in of), f"{sum(r.clean for r in of)} of {len(of)}")
        for tool in tools
        if (of := [r for r in runs if r.tool == tool])
    ]
    print(tabulate(rows, ("tool", "passed", "failed", "parts clean")))
    bad, passed = [r for r in runs if not r.clean], sum(r.passed for r in runs)
    print(f"{', '.join(tools)}: {passed} tests passed; {len(bad)} of {len(runs)} runs found something ({known.out})")
    return 1 if bad or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
