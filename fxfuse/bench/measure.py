"""Measures one case: every rival's error and peak memory, then all their times side by side."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxfuse.bench import accuracy, graphs, memory, rivals
from fxfuse.bench.cases import Case, Runner, Setup
from fxfuse.bench.limits import Limits, matmul_precision
from fxfuse.bench.timing import Step, time_together

Row = dict[str, Any]
BASELINE = "eager"


@dataclass
class Effort:
    """How much to measure. `seconds_left()` bounds the rounds of a case; `tell` reports what is being done."""

    device: torch.device
    seed: int
    rounds: int
    cache_bytes: int
    seconds_left: Callable[[], float] = lambda: float("inf")
    tell: Callable[[str], None] = field(default=lambda what: None)


def first_line(error: BaseException) -> str:
    """An exception as one short line for a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def empty_row(case: Case, rival: str, status: str, reason: str = "") -> Row:
    """A row without numbers: what was to be measured, its `status` ("failed", "missing", "n/a", "skipped") and why."""
    return {
        "workload": case.workload.name,
        "shape": list(case.shape),
        "precision": case.precision,
        "mode": case.mode,
        "rival": rival,
        "status": status,
        "reason": reason,
    }


def measure_case(case: Case, names: Sequence[str], limits: Limits, effort: Effort) -> list[Row]:
    """One row per rival of `names`, in their order. A rival that fails gets a row saying so; the others go on.

    Raises what building the model, its inputs or the float64 reference raises (out of memory, say).
    """
    rivals.reset()
    _free(effort.device, whole=True)
    with matmul_precision(case.precision):
        effort.tell("model and inputs")
        setup = Setup.make(case, effort.device, effort.seed, effort.cache_bytes)
        effort.tell("float64 reference")
        reference = setup.reference()
        _free(effort.device)
        rows: dict[str, Row] = {}
        runners: dict[str, Runner] = {}
        for name in names:
            effort.tell(name)
            try:
                rows[name], runners[name] = _prepare(setup, name, reference, effort)
            except rivals.Unavailable as why:
                rows[name] = empty_row(case, name, why.status, str(why))
            except Exception as error:
                rows[name] = empty_row(case, name, "failed", first_line(error))
            _free(effort.device)
        del reference
        _free(effort.device)
        effort.tell("timing")
        _time(runners, rows, effort)
    _relate(rows, limits.milliseconds(case.workload.work(case.shape, case.dtype.itemsize, case.mode == "fwdbwd"),
                                      case.precision, effort.device))
    return list(rows.values())


def _prepare(setup: Setup, name: str, reference: accuracy.Result, effort: Effort) -> tuple[Row, Runner]:
    """Compile and warm one rival, take its error on the first call and its memory on a later one."""
    graph_pool = memory.graph_pool_bytes(effort.device)
    model = setup.fresh_model()
    rival = rivals.RIVALS[name]
    callee = rival.prepare(model, setup.case.workload)
    if rival.yardstick:
        assert isinstance(callee, torch.nn.Module)
        runner = Runner(setup, callee, callee)
    elif rival.cuda_graphs and effort.device.type == "cuda":
        # Without the mark, a graph's outputs of the last call are taken as still wanted.
        runner = Runner(setup, model, callee, before_call=torch.compiler.cudagraph_mark_step_begin)
    else:
        runner = Runner(setup, model, callee)
    row = empty_row(setup.case, name, "ok")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch._inductor")
        if not rival.yardstick:
            row |= accuracy.errors(runner.result(), reference)
        if not all(math.isfinite(value) for key, value in row.items() if key.endswith("error")):
            raise ArithmeticError("the result is wrong: not finite, or not of the reference's shape")
        for i in range(2):
            runner.step(i)
        row["peak_bytes"] = memory.peak_bytes(lambda: runner.step(2), effort.device, graph_pool)
    if name in ("fxfuse", "frozen"):
        row["replaced"] = rivals.replaced_patterns(callee)
    return row, runner


def _time(runners: dict[str, Runner], rows: dict[str, Row], effort: Effort) -> None:
    """Time the runners together; one that fails now is dropped with its reason and the rest are timed again."""
    while runners:
        steps = {name: _named(name, runner.step) for name, runner in runners.items()}
        try:
            times = time_together(steps, effort.device, rounds=effort.rounds, seconds=effort.seconds_left())
        except _StepFailed as failure:
            runners.pop(failure.rival)
            rows[failure.rival] |= {"status": "failed", "reason": first_line(failure.cause)}
            continue
        for name, timing in times.items():
            rows[name] |= timing.as_dict()
        if effort.device.type == "cuda":
            effort.tell("GPU time")
            _time_graphs(steps, rows, effort)
        return


def _time_graphs(steps: dict[str, Callable[[int], None]], rows: dict[str, Row], effort: Effort) -> None:
    """Add `gpu_ms`, the time of one call replayed from a CUDA graph, where a rival can be captured. Graphs are timed in
    turn, as calls are; where memory does not hold all of them at once, those that it holds."""
    held: dict[str, tuple[Step, int]] = {}
    for name, step in steps.items():
        if rivals.RIVALS[name].cuda_graphs:
            rows[name]["gpu_reason"] = "replays graphs of its own"
            continue
        calls = graphs.calls_in_graph(rows[name]["median_ms"])
        try:
            held[name] = _captured(step, calls, effort), calls
        except torch.OutOfMemoryError:
            _time_held(held, rows, effort)
            try:
                held[name] = _captured(step, calls, effort), calls
            except Exception as error:
                rows[name]["gpu_reason"] = first_line(error)
        except Exception as error:
            rows[name]["gpu_reason"] = first_line(error)
    _time_held(held, rows, effort)


def _captured(step: Step, calls: int, effort: Effort) -> Step:
    try:
        return graphs.replaying(graphs.capture(step, calls, effort.device))
    finally:
        _free(effort.device)


def _time_held(held: dict[str, tuple[Step, int]], rows: dict[str, Row], effort: Effort) -> None:
    """Time the graphs at hand together, and let go of them."""
    try:
        steps = {name: replay for name, (replay, _) in held.items()}
        times = time_together(steps, effort.device, rounds=max(5, effort.rounds)) if steps else {}
        for name, timing in times.items():
            rows[name]["gpu_ms"] = timing.median_ms / held[name][1]
            rows[name]["gpu_spread"] = timing.spread
        steps.clear()
    except Exception as error:
        for name in held:
            rows[name]["gpu_reason"] = first_line(error)
    finally:
        held.clear()
        _free(effort.device)


class _StepFailed(Exception):
    def __init__(self, rival: str, cause: Exception) -> None:
        super().__init__(rival)
        self.rival, self.cause = rival, cause


def _named(rival: str, step: Callable[[int], None]) -> Callable[[int], None]:
    def run(i: int) -> None:
        try:
            step(i)
        except Exception as error:
            raise _StepFailed(rival, error) from error

    return run


def _relate(rows: dict[str, Row], limit_ms: float | None) -> None:
    """Add what compares: `ratio` (eager's time over this one's), the limit and the share of it that is reached."""
    baseline = rows.get(BASELINE, {}).get("median_ms")
    gpu_baseline = rows.get(BASELINE, {}).get("gpu_ms")
    for row in rows.values():
        if "gpu_ms" in row:
            row["gpu_ratio"] = gpu_baseline / row["gpu_ms"] if gpu_baseline else None
            row["gpu_share_of_limit"] = limit_ms / row["gpu_ms"] if limit_ms else None
        if "median_ms" not in row:
            continue
        row["ratio"] = baseline / row["median_ms"] if baseline else None
        row["limit_ms"] = limit_ms
        row["share_of_limit"] = limit_ms / row["median_ms"] if limit_ms else None


def _free(device: torch.device, whole: bool = False) -> None:
    """Give memory back; the `whole` heap is searched for cycles once a case, since that takes as long as measuring."""
    gc.collect(2 if whole else 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
