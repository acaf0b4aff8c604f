"""How numbers, cases and results are written, the same in every table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fxfuse.bench.cases import format_shape
from fxfuse.bench.workloads import WORKLOADS

Row = dict[str, Any]
CaseKey = tuple[str, tuple[int, ...], str, str]
DASH = "–"


def milliseconds(value: float | None) -> str:
    """Three significant digits without an exponent: 0.0721, 2.73, 118."""
    if value is None:
        return DASH
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"


def size(value: float | None) -> str:
    """Bytes in the unit that reads best."""
    if value is None:
        return DASH
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 999.5 * factor else f"{value / factor:.0f} {unit}"
    return f"{value:.0f} B"


def ratio(value: float | None) -> str:
    """1.84 -> "1.84×"; at least 10 without decimals but one."""
    return DASH if value is None else f"{value:.2f}×" if value < 9.995 else f"{value:.1f}×"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.0f} %"


def error(value: float | None) -> str:
    return DASH if value is None else f"{value:.1e}"


def by_case(rows: Iterable[Row]) -> dict[CaseKey, dict[str, Row]]:
    """Rows grouped by case, in order; inside, by rival."""
    grouped: dict[CaseKey, dict[str, Row]] = {}
    for row in rows:
        key = (row["workload"], tuple(row["shape"]), row["precision"], row["mode"])
        grouped.setdefault(key, {})[row["rival"]] = row
    return grouped


def case_title(key: CaseKey) -> str:
    """A case's heading: "KL divergence 4096×4096, fp32, fwd"."""
    workload, shape, precision, mode = key
    title = WORKLOADS[workload].title if workload in WORKLOADS else workload
    return f"{title} {format_shape(shape)}, {precision}, {mode}"
