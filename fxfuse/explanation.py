"""explain(): why each replacement was made, what it saves, the algebra, how it is computed, what was left alone."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import ops
from fxfuse.api import FusedFunction
from fxfuse.api import report as report_of
from fxfuse.cost import Estimate, Unknown, estimate
from fxfuse.known import UNKNOWN
from fxfuse.pattern import Pattern, Words, available
from fxfuse.plan import plan_of
from fxfuse.report import WAY_IN, Replacement, Report, Tensor

__all__ = ["Entry", "Explanation", "explain"]

_WIDTH = 80
_LABEL = 11


@dataclass(frozen=True)
class Entry:
    """One replacement, explained.

    Attributes:
        replacement: as in the report.
        words: the pattern's sentences (why, fuses, algebra, left).
        road: the road the op takes on this machine and why, as "name: why"; "" where the op has none.
        road_with_gradients: the same where gradients are wanted.
        estimate: cost before and after on this device, or None.
        unknown: why there is no estimate.
    """

    replacement: Replacement
    words: Words
    road: str
    road_with_gradients: str
    estimate: Estimate | None
    unknown: str = ""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns: print it, or read its fields.

    Attributes:
        report: the report it explains.
        entries: one :class:`Entry` per replacement, in graph order.
    """

    report: Report
    entries: tuple[Entry, ...] = field(default=())

    def __str__(self) -> str:
        parts = [self.report.heading()]
        parts += _entry_texts(self.entries)
        parts += [_left_alone(self.report), textwrap.fill(self.report.verified, _WIDTH)]
        parts += [_how_kernels_run(self.entries), _about_estimates(self.entries)]
        return "\n\n".join(filter(None, parts))

    __repr__ = __str__


def explain(fused: Any) -> Explanation:
    """The story of an optimized module or function, for a person, at 80 columns.

    Args:
        fused: what :func:`fxfuse.optimize` returned, or a :class:`fxfuse.report.Report` (of
            :func:`fxfuse.reports`, say).

    Raises:
        TypeError: for anything else.
    """
    report = fused if isinstance(fused, Report) else report_of(fused)
    patterns = {**available(), **_chosen(fused)}
    return Explanation(report, tuple(_entry(r, patterns.get(r.pattern)) for r in report.replacements))


def _chosen(fused: Any) -> dict[str, Pattern]:
    """Patterns that were given as objects and need not be registered."""
    plans = [plan_of(m) for m in fused.modules()] if isinstance(fused, nn.Module) else []
    plans += [fused._plan] if isinstance(fused, FusedFunction) else []
    return {p.name: p for plan in plans if plan is not None for p in plan.chosen}


def _entry(replacement: Replacement, pattern: Pattern | None) -> Entry:
    words = pattern.words if pattern is not None else Words()
    roads = _road(replacement, gradients=False), _road(replacement, gradients=True)
    try:
        found = estimate(replacement, pattern.cost if pattern is not None else None)
    except Unknown as reason:
        return Entry(replacement, words, *roads, None, str(reason))
    return Entry(replacement, words, *roads, found)


# --- the road --------------------------------------------------------------------------------------------------------


def _road(replacement: Replacement, gradients: bool) -> str:
    """The op's own word on these arguments, asked with tensors that hold no memory; "" where it cannot be asked."""
    if replacement.op not in ops.names() or UNKNOWN in replacement.call.values() or not replacement.call:
        return ""
    op = ops.get(replacement.op)
    given = dict(replacement.call)
    schema = [a.name for a in op.registered.arguments]
    with FakeTensorMode(), torch.set_grad_enabled(gradients):
        for name, value in replacement.call.items():
            module, dot, key = name.partition(".")
            if dot:  # a module's tensors and settings, as bn.weight
                given.pop(name)
                name = next((n for n in (f"{module}_{key}", key) if n in schema and n not in given), "")
            if name:
                given[name] = _empty(value, gradients) if isinstance(value, Tensor) else value
        try:
            road = op.road(**{k: v for k, v in given.items() if k in schema})
        except Exception:  # a road that looks at memory decides when it is called
            return ""
    return f"{road.name}: {road.why}"


def _empty(tensor: Tensor, gradients: bool) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    wanted = gradients and dtype.is_floating_point
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device, requires_grad=wanted)


# --- text ------------------------------------------------------------------------------------------------------------


def _entry_texts(entries: tuple[Entry, ...]) -> list[str]:
    """Equal replacements (of a stack of layers) are told once, and a pattern's sentences at its first replacement."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        r = entry.replacement
        alike.setdefault((r.pattern, r.operations, tuple(r.call.items()), r.result, entry.road), []).append(entry)
    texts: list[str] = []
    told: dict[str, int] = {}
    for number, group in enumerate(alike.values(), 1):
        texts.append(_entry_text(number, group, told.get(group[0].replacement.pattern)))
        told.setdefault(group[0].replacement.pattern, number)
    return texts


def _entry_text(number: int, group: list[Entry], told: int | None) -> str:
    entry, replacement = group[0], group[0].replacement
    places = list(dict.fromkeys(e.replacement.where or "the model" for e in group))
    listed = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    times = f", {len(group)} times" if len(group) > 1 else ""
    lines = [
        textwrap.fill(f"{number}. {replacement.pattern} in {listed}{times}", _WIDTH, subsequent_indent="   "),
        _labelled("Was", " → ".join(replacement.operations)),
        _labelled("Is", f"one call of {replacement.op}" + _shapes(replacement)),
    ]
    words = entry.words
    named = (("Why", words.why), ("Fused", words.fuses), ("Algebra", words.algebra), ("Left alone", words.left))
    if told is None:
        lines += [_labelled(label, text) for label, text in named if text]
    else:
        lines.append(_labelled("Why", f"as in {told}"))
    lines.append(_labelled("Road", entry.road or _no_road(replacement)))
    if entry.road_with_gradients != entry.road:
        lines.append(_labelled("", f"with gradients, {entry.road_with_gradients}"))
    lines.append(_gain(entry))
    return "\n".join(lines)


def _labelled(label: str, text: str) -> str:
    indent = " " * (_LABEL + 3)
    first = f"   {label:<{_LABEL}}"
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _shapes(replacement: Replacement) -> str:
    """ " on x[1024 × 512], weight[...] in float32": the tensors with two or more dimensions."""
    given = [(k, v) for k, v in replacement.call.items() if isinstance(v, Tensor) and len(v.shape) > 1 and "." not in k]
    if not given:
        return ""
    dtypes = ", ".join(dict.fromkeys(v.dtype for _, v in given))
    return f" on {', '.join(f'{k}[{_sizes(v)}]' for k, v in given[:3])} in {dtypes}"


def _sizes(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _no_road(replacement: Replacement) -> str:
    if replacement.op not in ops.names():
        return f"the function {replacement.op}, as its author wrote it"
    return "chosen at each call from the tensors it is given; fxfuse doctor lists the roads of this machine"


def _gain(entry: Entry) -> str:
    found = entry.estimate
    if found is None:
        return _labelled("Gain", f"no estimate: {entry.unknown}.")
    rows = [
        ("bytes moved", _bytes(found.before.bytes), _bytes(found.after.bytes)),
        ("matrix operations", _count(found.before.matrix), _count(found.after.matrix)),
        ("written on the way", _bytes(found.before.between), _bytes(found.after.between)),
        ("time", _time(found.seconds_before), _time(found.seconds_after)),
    ]
    table = tabulate(rows, ("", "before", "after"), "plain", disable_numparse=True, colalign=("left", "right", "right"))
    indent = " " * (_LABEL + 3)
    return _labelled("Gain", _verdict(entry, found)) + "\n" + textwrap.indent(table, indent)


def _verdict(entry: Entry, found: Estimate) -> str:
    """The expected gain in one sentence, held against the road that is really taken."""
    speedup = f"{found.speedup:.1f}×" if found.speedup < 10 else f"{found.speedup:.0f}×"
    faster = f"{speedup} in time" if found.speedup >= 1.05 else "next to nothing in time"
    times = f"{faster} and {_bytes(found.before.between - found.after.between)} of memory"
    if entry.road.startswith("composed"):
        return f"none on this road, which runs the same operations; a kernel could reach {times}."
    if entry.road.startswith("closed"):
        return f"at most {times}; this road makes several passes and reaches a part of it."
    return f"about {times} that is neither written nor kept."


def _left_alone(report: Report) -> str:
    lines = [f"{_place(n.where, n.node)}: no {n.pattern}, {n.reason}." for n in report.near_misses]
    lines += [f"{_place(u.where)}: keeps its own Python, {u.reason}. Way in: {WAY_IN}" for u in report.untraceable]
    lines += [f"{_place(u.where)}: {u.pattern} was undone, {u.what} was out of bounds." for u in report.undone]
    lines += report.notes
    if not lines:
        return "Everything else in the graph is as it was; no pattern came near it."
    text = [textwrap.fill(line, _WIDTH, initial_indent="   ", subsequent_indent="     ") for line in lines]
    return "\n".join(["Left alone, and why", *text])


def _place(where: str, node: str = "") -> str:
    return ": ".join(filter(None, (where, node))) or "the model"


def _how_kernels_run(entries: tuple[Entry, ...]) -> str:
    if not any(e.replacement.op in ops.names() for e in entries):
        return ""
    text = (
        "An op is an ordinary PyTorch operator, torch.ops.fxfuse.<name>, with its own backward. Where a CUDA kernel "
        "fits what it is given, it launches that on the current stream; the kernels are CUDA C++ without any torch "
        "header, built once by nvcc (or taken from the package) and called through ctypes. Everywhere else it computes "
        "the same with PyTorch's own operations. fxfuse doctor says what this machine has."
    )
    return "How it is computed\n" + textwrap.fill(text, _WIDTH, initial_indent="   ", subsequent_indent="   ")


def _about_estimates(entries: tuple[Entry, ...]) -> str:
    rates = next((e.estimate.rates for e in entries if e.estimate is not None), None)
    if rates is None:
        return ""
    text = (
        "Gains are estimates for one forward call, not measurements: every operation reads and writes memory once. "
        f"Rates of {rates.name} ({rates.origin}): {rates.bandwidth / 1e9:.3g} GB/s, "
        f"{_rate(rates.product('float32'))} in float32 products. fxfuse bench measures."
    )
    return textwrap.fill(text, _WIDTH)


def _bytes(number: int) -> str:
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _count(number: int) -> str:
    return _scaled(number, 1000, ("", "thousand", "million", "billion", "trillion")).strip()


def _rate(number: float) -> str:
    return _scaled(number, 1000, ("", "k", "M", "G", "T")) + "FLOP/s"


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(number) >= step and power < len(units) - 1:
        number, power = number / step, power + 1
    return f"{number:.3g} {units[power]}" if number < 999.5 else f"{number:.0f} {units[power]}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
