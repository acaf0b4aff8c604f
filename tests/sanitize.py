"""The CUDA suite under compute-sanitizer: ``python tests/sanitize.py [--tool TOOL] [--workers N] [pytest arguments]``.

Each tool (memcheck, racecheck, synccheck unless named) goes over every test marked ``cuda``, in parts, N processes on
each GPU at a time; tests marked ``large`` come last, each in a process that has a GPU for itself. Only kernels of this
library are instrumented. Exits with 1 if a tool found anything, a test failed or parts are left, and says what, each
part as it ends; all that a process printed stays in ``--out``. ``--budget`` stops after so many seconds, ``--resume``
goes on with what is left, as long as sources and arguments are the same.

Every launch is waited for: else a tool keeps what it knows of each in the GPU's memory, tens of gigabytes of it. Nor
are backtraces of the host asked for: they go through Python's frames, which then keep every tensor that they hold. A
capture of a CUDA graph allows neither waiting nor what a tool does around a launch: tests marked ``captures`` are left
out, and so are those that measure memory, where the tools show. A process sees one GPU: tests that want two are
skipped. Tests of many draws draw twice, and their errors are judged without a tool (draws.py).

Racecheck and cuBLAS's Hopper kernels do not survive side by side, whether it instruments them or leaves them alone:
under it the library's products go by float64, which has other kernels. Where a kernel orders its shared memory in a way
that the tools cannot follow, FXFUSE_FOLLOWED has a variant of it run that they can.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import sanitizer_part
import torch
from sanitizer_part import FOUND, NO_TESTS, Kept, Run
from tabulate import tabulate

TOOLS = ("memcheck", "racecheck", "synccheck")
ARGUMENTS = {"racecheck": ("--plain-products",)}  # pytest's
PARTS, LARGE = "cuda and not large and not captures and not memory", "cuda and large"


@dataclass(frozen=True)
class Plan:
    """What to run, and how."""

    tools: tuple[str, ...]
    workers: int
    parts: int
    large: tuple[str, ...]  # tests
    arguments: tuple[str, ...]
    out: Path
    deadline: float

    def command(self, tool: str, mark: str, *more: str) -> list[str]:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        command += ["--report-api-errors", "no", "--force-blocking-launches", "--kernel-name", "kns=fxfuse"]
        command += ["--show-backtrace", "device"]
        command += [sys.executable, "-m", "pytest", "-m", mark, "-q", "-p", "no:cacheprovider", "--tb=short"]
        return [*command, "--under-a-tool", *ARGUMENTS.get(tool, ()), *more]

    def log(self, tool: str, part: str) -> Path:
        return self.out / f"{tool}.{part}.log"

    def one(self, tool: str, part: str, command: list[str], gpu: str) -> Run:
        if time.monotonic() >= self.deadline:
            return Run(tool, part)
        return sanitizer_part.run(tool, part, command, self.log(tool, part), gpu, self.deadline)


def gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them; at least one, which need not be there."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(max(1, torch.cuda.device_count()))]


def large_tests(arguments: Iterable[str]) -> tuple[str, ...]:
    """The tests marked ``large`` among those that ``arguments`` select; ends the command where pytest cannot tell."""
    command = [sys.executable, "-m", "pytest", "-m", LARGE, "--collect-only", "-q", "-p", "no:cacheprovider"]
    said = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if said.returncode not in (0, NO_TESTS):
        sys.exit(f"pytest cannot collect the tests:\n{said.stdout[-2000:]}{said.stderr[-2000:]}")
    return tuple(line for line in said.stdout.splitlines() if "::" in line)


def side_by_side(jobs: list[tuple[str, str, list[str]]], plan: Plan, workers: int) -> Iterator[Run]:
    """(tool, part, command) each, ``workers`` on a GPU at a time; each run as it ends."""
    free: SimpleQueue[str] = SimpleQueue()
    for gpu in gpus() * workers:
        free.put(gpu)

    def one(tool: str, part: str, command: list[str]) -> Run:
        gpu = free.get()
        try:
            return plan.one(tool, part, command, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(free.qsize()) as pool:
        try:
            for run in as_completed([pool.submit(one, *job) for job in jobs]):
                yield run.result()
        except BaseException:  # stopped by hand, or by who asked for this
            pool.shutdown(wait=False, cancel_futures=True)
            sanitizer_part.stop()
            raise


def over(tool: str, plan: Plan, known: Callable[[str, str], Run | None]) -> Iterator[Run]:
    """``tool`` over all tests, but for the parts that are ``known``; each run as it ends, those known first."""
    n = plan.parts
    parts = [
        (tool, f"{i + 1}-of-{n}", plan.command(tool, PARTS, f"--part={i}/{n}", *plan.arguments)) for i in range(n)
    ]
    large = [(tool, f"large-{i + 1}", plan.command(tool, LARGE, test)) for i, test in enumerate(plan.large)]
    yield from filter(None, (known(*job[:2]) for job in parts + large))
    for jobs, workers in ((parts, plan.workers), (large, 1)):
        yield from side_by_side([job for job in jobs if known(*job[:2]) is None], plan, workers)


def main() -> int:
    """Runs the tools one after another; 0 if none of them found anything and every test passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    most = min(6, os.cpu_count() or 1)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be given again (default: all)")
    parser.add_argument("--workers", type=int, default=most, help="processes a GPU at a time (default %(default)s)")
    parser.add_argument("--parts", type=int, help="parts of the tests (default: two for each process)")
    parser.add_argument("--out", type=Path, default=Path("out/sanitize"), help="logs (default %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="stop after S seconds")
    parser.add_argument("--resume", action="store_true", help="leave out what --out knows to be clean")
    given, arguments = parser.parse_known_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer comes with the CUDA toolkit; put it on PATH")
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    plan = Plan(
        tuple(given.tool or TOOLS), given.workers, given.parts or 2 * given.workers * len(gpus()),
        large_tests(arguments), tuple(arguments), given.out, started + given.budget,
    )  # fmt: skip
    kept = Kept(given.out / "clean.json", [str(plan.parts), *arguments])
    if given.resume:
        print(f"{kept.read()} runs were clean before", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    runs = go_over(plan, kept)
    bad, left = [r for r in runs if r.ended and not r.clean], [r for r in runs if not r.ended]
    print(f"{', '.join(plan.tools)}: {sum(r.passed for r in runs)} tests passed; {len(bad)} of {len(runs)} runs found "
          f"something, {len(left)} are left{' (--resume runs them)' if left else ''}; logs in {plan.out}")  # fmt: skip
    return int(bool(bad or left or not any(r.passed for r in runs)))


def go_over(plan: Plan, kept: Kept) -> list[Run]:
    """All runs of all tools, each told as it ends, and a table of them."""
    runs: list[Run] = []
    for tool in plan.tools:
        for r in over(tool, plan, kept.find):
            runs.append(r)
            if kept.find(r.tool, r.part) is not None or not r.ended:
                continue
            print(r, flush=True)
            if r.clean:
                kept.add(r)
            else:
                log = plan.log(r.tool, r.part)
                print(f"{log}:", *sanitizer_part.why(log), sep="\n    ", flush=True)
    rows = [
        (tool, sum(r.passed for r in of), sum(r.failed for r in of), f"{sum(r.clean for r in of)} of {len(of)}",
         f"{sum(r.seconds for r in of):.0f}")
        for tool in plan.tools
        if (of := [r for r in runs if r.tool == tool])
    ]  # fmt: skip
    print(tabulate(rows, ("tool", "passed", "failed", "runs clean", "seconds of all")))
    return runs


if __name__ == "__main__":
    sys.exit(main())
