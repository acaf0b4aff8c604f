"""`fxfuse bench`: options, the loop over the cases within a budget of time, the JSON and the table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fxfuse.bench import compiler, machine, terminal
from fxfuse.bench import limits as ceilings
from fxfuse.bench.cases import DEFAULT_PRECISIONS, MODES, Case, parse_shapes, plan
from fxfuse.bench.formats import by_case
from fxfuse.bench.measure import Effort, Row, empty_row, first_line, measure_case
from fxfuse.bench.progress import Progress
from fxfuse.bench.rivals import RIVALS
from fxfuse.bench.workloads import WORKLOADS

SCHEMA = 1
DEFAULT_VS = ("eager", "compile")
DEFAULT_ROUNDS = {"cuda": 30, "cpu": 7}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fxfuse bench`."""
    every = "all that apply"
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    parser.add_argument("--workload", type=_names(WORKLOADS), metavar="W,...", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--mode", type=_names(MODES), metavar="M,...", help=f"fwd, fwdbwd (default: {every})")
    parser.add_argument(
        "--precision",
        type=_names(ceilings.PRECISION_DTYPE),
        metavar="P,...",
        help="fp32, tf32, bf16, fp16 (default: fp32,tf32,bf16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument(
        "--vs", type=_names(RIVALS), metavar="R,...", help=f"of {', '.join(RIVALS)} (default: eager,compile; "
        "fxfuse always runs, eager is the ratio's base)"
    )  # fmt: skip
    parser.add_argument("--shapes", type=_shapes, metavar="M,N,K;...", help="your own sizes; M,N for divergences")
    parser.add_argument("--sweep", action="store_true", help="many sizes: small, tall, flat and odd ones")
    parser.add_argument("--compiler", action="store_true", help="also what optimizing itself costs, on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after every case")
    parser.add_argument("--append", action="store_true", help="keep the cases in FILE that this run does not measure")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there (PNG; needs matplotlib)")
    parser.add_argument("--repeat", type=_positive(int), metavar="N", help="rounds of timing (default: 30; CPU 7)")
    parser.add_argument("--budget", type=_positive(float), metavar="SECONDS", help="stop in time; the rest is skipped")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")


def _names(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(filter(None, text.split(","))))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is not one of {', '.join(known)}")
        return names

    return parse


def _shapes(text: str) -> list[tuple[int, ...]]:
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if (number := kind(text)) > 0:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")

    return parse


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one; ValueError when it can't be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; cuda, cuda:1 and cpu are") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no CUDA device (fxfuse doctor says more)")
    if device.type not in DEFAULT_ROUNDS:
        raise ValueError(f"--device {name}: only cuda and cpu are measured")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def main(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the bench with parsed options; `command` is recorded. Returns the exit code: 0, 1 when a measurement failed,
    2 when the options ask for nothing that can be measured."""
    try:
        device = pick_device(args.device)
        cases = plan(
            args.workload or list(WORKLOADS),
            args.shapes,
            args.precision or DEFAULT_PRECISIONS[device.type],
            args.mode or MODES,
            device,
            args.sweep,
        )
    except ValueError as error:
        print(f"fxfuse bench: {error}", file=sys.stderr)
        return 2
    if args.append and not args.json:
        print("fxfuse bench: --append adds to the file of --json; name one", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    names = list(dict.fromkeys(["eager", *(args.vs or DEFAULT_VS), "fxfuse"]))
    rounds = args.repeat or DEFAULT_ROUNDS[device.type]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": shlex.join(["fxfuse", *(_without_folder(word) for word in command)]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "seed": args.seed,
        "device": device.type,
        "machine": machine.machine(device),
        "versions": machine.versions(),
        "limits": {},
        "results": [],
    }
    earlier = None
    if args.compiler:
        document["compiler"] = compiler.measure(rounds)
    if args.append and args.json.exists():
        try:
            earlier = json.loads(args.json.read_text())
            check_same_setting(earlier, document)
        except (ValueError, KeyError) as error:
            print(f"fxfuse bench: can't append to {args.json}: {error}", file=sys.stderr)
            return 2

    def keep() -> None:
        if args.json:
            save(merged(earlier, document) if earlier else document, args.json)

    run_cases(cases, names, device, document, rounds=rounds, seed=args.seed, budget=args.budget, keep=keep)

    print(terminal.show_sweep(document) if args.sweep else terminal.show(document))
    if args.compiler:
        print("\n" + terminal.show_compiler(document))
    if args.json:
        print(f"\nresults: {args.json}")
    if args.plot:
        from fxfuse.bench import plot

        plot.draw(merged(earlier, document) if earlier else document, args.plot)
        print(f"plot: {args.plot}")
    return int(any(row["status"] == "failed" for row in document["results"]))


def run_cases(
    cases: Sequence[Case],
    names: Sequence[str],
    device: torch.device,
    document: dict[str, Any],
    *,
    rounds: int,
    seed: int,
    budget: float | None = None,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Measure `cases` into `document["results"]` and `keep()` them after each; whatever happens, the rest is marked as
    skipped and kept too."""
    deadline = time.monotonic() + budget if budget else float("inf")
    results: list[Row] = document["results"]
    done = 0
    stopped = ""
    with Progress(len(cases)) as progress:
        try:
            with stop_at(deadline):
                limits = ceilings.Limits()
                effort = Effort(device, seed, rounds, machine.cache_bytes(device))
                _measure_limits(limits, cases, device, document, progress)
                for case in cases:
                    share = (deadline - time.monotonic()) / (len(cases) - done)
                    case_ends = time.monotonic() + share
                    effort.seconds_left = lambda ends=case_ends: max(0.0, ends - time.monotonic())  # type: ignore[misc]
                    effort.tell = lambda what, case=case: progress.tell(f"{case}: {what}")  # type: ignore[misc]
                    results.extend(_rows(case, names, limits, effort))
                    done += 1
                    progress.advance()
                    keep()
        except OutOfTime:
            stopped = f"the budget of {budget:g} s was spent"
        except KeyboardInterrupt:
            stopped = "interrupted"
    for case in cases[done:]:
        results.extend(empty_row(case, name, "skipped", stopped) for name in names)
    keep()


def _measure_limits(
    limits: ceilings.Limits, cases: Sequence[Case], device: torch.device, document: dict[str, Any], progress: Progress
) -> None:
    """Measure the ceilings these cases need; a failure is recorded and leaves the limits empty."""
    try:
        progress.tell("limits: bandwidth")
        ceilings.measure_bandwidth(limits, device)
        precisions = list(dict.fromkeys(case.precision for case in cases if case.workload.has_product))
        if "fp32" in precisions and device.type == "cuda" and "bf16" not in precisions:
            precisions.append("bf16")  # float32 products can be had from bf16 ones
        for precision in precisions:
            progress.tell(f"limits: {precision} products")
            ceilings.measure_matrix_rate(limits, device, precision)
    except Exception as error:
        document["limits_failed"] = first_line(error)
    document["limits"] = limits.as_dict()


def _rows(case: Case, names: Sequence[str], limits: ceilings.Limits, effort: Effort) -> list[Row]:
    try:
        return measure_case(case, names, limits, effort)
    except Exception as error:
        return [empty_row(case, name, "failed", first_line(error)) for name in names]


class OutOfTime(BaseException):
    """The budget is spent. Not an Exception, so that no rival's own error handling swallows it."""


@contextlib.contextmanager
def stop_at(deadline: float) -> Iterator[None]:
    """Raise OutOfTime inside once `deadline` (time.monotonic) has passed, also in the middle of a compilation."""
    if deadline == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_same_setting(earlier: dict[str, Any], document: dict[str, Any]) -> None:
    """ValueError unless both were measured on the same machine with the same versions and seed: one table must not
    compare across them."""
    for key in ("schema", "device", "machine", "versions", "seed"):
        if earlier[key] != document[key]:
            raise ValueError(f"its {key} is {earlier[key]}, here it is {document[key]}")


def merged(earlier: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """`earlier` with the cases that `document` measured put in the place of its own, all rivals of a case together:
    they were timed side by side. Cases that were skipped or failed now do not replace measured ones."""
    old, new = by_case(earlier["results"]), by_case(document["results"])
    for key, rows in new.items():
        if key not in old or any(row["status"] == "ok" for row in rows.values()):
            old[key] = rows
    commands = [c for c in (earlier["command"], document["command"]) if c]
    return {
        **{key: value for key, value in earlier.items() if key == "compiler"},
        **document,
        "command": " && ".join(dict.fromkeys(commands)),
        "limits": _merged_limits(earlier["limits"], document["limits"]),
        "results": [row for rows in old.values() for row in rows.values()],
    }


def _without_folder(word: str) -> str:
    """A path of this machine as its last part: results are read elsewhere."""
    return Path(word).name if os.path.isabs(word) else word


def _merged_limits(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The later ceilings, with the matrix rates that only the earlier run had need of."""
    if not later:
        return earlier
    return {**earlier, **later, "matrix_rate": {**earlier.get("matrix_rate", {}), **later.get("matrix_rate", {})}}


def save(document: dict[str, Any], path: Path) -> None:
    """Write the JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
