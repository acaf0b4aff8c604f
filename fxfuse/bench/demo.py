"""`fxfuse demo`: five models before and after `fxfuse.optimize` on this machine: what matched, time, memory, error."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time

import torch
from tabulate import tabulate

import fxfuse
from fxfuse.bench import formats, machine
from fxfuse.bench.cases import Case, Setup, format_shape
from fxfuse.bench.limits import Limits
from fxfuse.bench.measure import Effort, Row, empty_row, first_line, measure_case
from fxfuse.bench.run import pick_device
from fxfuse.bench.workloads import WORKLOADS

WIDTH = 80
# (workload, mode): the matrix models forward, the losses as in training.
DEMO = (
    ("linear_scale_batchnorm1d_train", "fwd"),
    ("matmul_div_sum_scale", "fwd"),
    ("linear_activation_scale", "fwd"),
    ("kl_div", "fwdbwd"),
    ("distillation_kl", "fwdbwd"),
)
ROUNDS = {"cuda": 20, "cpu": 5}
SECONDS_A_MODEL = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fxfuse demo`."""
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda where there is one)")


def main(args: argparse.Namespace) -> int:
    """Show the five models; returns 1 when one of them could not be measured or nothing was replaced in it."""
    try:
        device = pick_device(args.device)
    except ValueError as error:
        print(f"fxfuse demo: {error}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    about = machine.machine(device)
    print(textwrap.fill(
        f"fxfuse on {about.get('gpu') or about['cpu']}"
        + ("" if device.type == "cuda" else f", {about['torch_threads']} threads, no GPU kernels")
        + f"; torch {torch.__version__}. Each model is measured as PyTorch runs it (eager) and after"
        " fxfuse.optimize(model), side by side.", WIDTH))  # fmt: skip

    rows = []
    for number, (name, mode) in enumerate(DEMO, 1):
        case = Case(WORKLOADS[name], WORKLOADS[name].sizes[device.type][0], "fp32", mode)
        print(f"\n{number}. {case.workload.title}, {format_shape(case.shape)}", flush=True)
        print(f"   {case.workload.formula}", flush=True)
        pair = _measure(case, device)
        rows.append((case, *pair))
        print(_replaced(case, device), flush=True)
    print("\n" + _table(rows))
    print(textwrap.fill(
        "Times are medians of one float32 call, of the forward alone or (+ grad) with the backward. MiB: peak memory"
        " beyond inputs and weights. Error: against the same model in float64.", WIDTH))  # fmt: skip
    failed = [row for _, *pair in rows for row in pair if row["status"] != "ok"]
    for row in failed:
        print(textwrap.fill(f"{row['workload']}, {row['rival']}: {row['reason']}", WIDTH))
    unmatched = [ours["workload"] for _, _, ours in rows if ours["status"] == "ok" and not ours["replaced"]]
    return int(bool(failed or unmatched))


def _measure(case: Case, device: torch.device) -> tuple[Row, Row]:
    """The rows of eager and fxfuse."""
    ends = time.monotonic() + SECONDS_A_MODEL
    effort = Effort(
        device,
        seed=0,
        rounds=ROUNDS[device.type],
        cache_bytes=machine.cache_bytes(device),
        seconds_left=lambda: max(0.0, ends - time.monotonic()),
    )
    try:
        eager, ours = measure_case(case, ("eager", "fxfuse"), Limits(), effort)
    except Exception as error:
        reason = first_line(error)
        return empty_row(case, "eager", "failed", reason), empty_row(case, "fxfuse", "failed", reason)
    return eager, ours


def _replaced(case: Case, device: torch.device) -> str:
    """What the report says of the model: each replacement, or what came nearest."""
    small: tuple[int, ...] = (4,) * len(case.shape)
    model = Setup.make(Case(case.workload, small, "fp32", case.mode), torch.device("cpu"), 0, 0).model
    report = fxfuse.report(fxfuse.optimize(model))
    lines = [f"   replaced: {', '.join(r.operations)} → {r.op}" for r in report.replacements]
    lines = lines or ["   nothing was replaced"]
    if not report.replacements:
        lines += [f"   {miss.pattern} came near: {miss.reason}" for miss in report.near_misses]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="     ") for line in lines)


def _table(rows: list[tuple[Case, Row, Row]]) -> str:
    """One line a model: eager and fxfuse in time, peak and error."""
    lines = []
    for number, (case, eager, ours) in enumerate(rows, 1):
        lines.append(
            [
                f"{number} {case.workload.short}" + (" + grad" if case.mode == "fwdbwd" else ""),
                _cell(eager, "median_ms", formats.milliseconds),
                _cell(ours, "median_ms", formats.milliseconds),
                formats.ratio(ours.get("ratio")),
                _cell(eager, "peak_bytes", _mebibytes),
                _cell(ours, "peak_bytes", _mebibytes),
                _cell(eager, "error", formats.error),
                _cell(ours, "error", formats.error),
            ]
        )
    headings = ["", "eager\nms", "fused\nms", "gain", "eager\nMiB", "fused\nMiB", "eager\nerror", "fused\nerror"]
    return tabulate(lines, headings, tablefmt="simple", disable_numparse=True, colalign=["left"] + ["right"] * 7)


def _mebibytes(value: float) -> str:
    mebibytes = value / (1 << 20)
    return "<0.01" if mebibytes < 0.01 else f"{mebibytes:.3g}" if mebibytes < 999.5 else f"{mebibytes:.0f}"


def _cell(row: Row, key: str, show: object) -> str:
    assert callable(show)
    return str(show(row[key])) if key in row else row["status"]
