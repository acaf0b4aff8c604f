"""The torch.compile door: the same rewrite on a Dynamo graph, then the inner compiler.

    torch.compile(model, backend="fxfuse", options={"inner": "inductor"})

What is not replaced goes on to the inner compiler unchanged. An op that Inductor cannot see into is put in only where a
kernel of ours runs, or where the op does less work by algebra; with ``inner`` eager or aot_eager every match is
replaced.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.fuse import configure_logging, fuse_graph
from fxfuse.match import Match
from fxfuse.pattern import Pattern, select
from fxfuse.report import Report

__all__ = ["INNER", "backend", "pre_grad_pass", "reports"]

INNER = ("inductor", "aot_eager", "eager")
#: reports of the graphs compiled last; older ones make room
_reports: collections.deque[Report] = collections.deque(maxlen=1000)


def reports() -> list[Report]:
    """The report of every graph the torch.compile backend has compiled in this process, newest last."""
    return list(_reports)


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
            mode: str | None = None) -> Callable[..., Any]:  # fmt: skip
    """Compile one Dynamo graph: ``torch.compile(model, backend="fxfuse")``.

    Args:
        gm: the graph, rewritten in place.
        example_inputs: real or fake tensors and symbolic numbers, as Dynamo gives them.
        options: ``inner`` is "inductor" (default), "aot_eager" or "eager"; ``patterns`` names the patterns to look for;
            every other key is an option of Inductor's.
        mode: an Inductor mode ("reduce-overhead", "max-autotune"), as torch.compile's own argument.

    Raises:
        ValueError: for another inner compiler, a pattern that does not exist, or Inductor options without Inductor.
    """
    configure_logging()
    settings = dict(options or {})
    inner = settings.pop("inner", "inductor")
    patterns = select(settings.pop("patterns", None))
    if inner not in INNER:
        raise ValueError(f"options={{'inner': {inner!r}}}: the inner compiler is one of {', '.join(INNER)}")
    if inner != "inductor" and (settings or mode):
        given = sorted(settings) or mode
        raise ValueError(f"the options {given!r} are Inductor's; with inner={inner!r} leave them out")
    rewrite(gm.graph, patterns, opaque_must_pay=inner == "inductor", title=f"torch.compile graph {len(_reports)}")
    gm.recompile()
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend("aot_eager")(gm, list(example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **settings}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return compiled


def pre_grad_pass(graph: fx.Graph) -> None:
    """The same rewrite as an Inductor pass: ``torch._inductor.config.pre_grad_custom_pass = fxfuse.pre_grad_pass``."""
    configure_logging()
    rewrite(graph, select(None), opaque_must_pay=True, title=f"Inductor pre-grad graph {len(_reports)}")


def rewrite(graph: fx.Graph, patterns: Sequence[Pattern], *, opaque_must_pay: bool, title: str) -> Report:
    """Rewrite a Dynamo graph in place and keep its report."""
    report = Report(title=title)
    left: list[Match] = []

    def allow(match: Match, pattern: Pattern) -> str | None:
        reason = left_to_inductor(match, pattern) if opaque_must_pay else None
        if reason is not None:
            left.append(match)
        return reason

    fuse_graph(graph, graph.owning_module, patterns, report, allow=allow)
    if left:
        kinds = ", ".join(sorted({m.pattern for m in left}))
        were = "match was" if len(left) == 1 else "matches were"
        report.notes.append(
            f"{len(left)} {were} left to Inductor ({kinds}), which fuses the same where no kernel of ours runs; "
            "options={'inner': 'aot_eager'} replaces them all."
        )
    _reports.append(report.settle())
    return report


def left_to_inductor(match: Match, pattern: Pattern) -> str | None:
    """Why an op Inductor cannot see into would be no gain here, or None where it pays."""
    if pattern.pays_always:
        return None
    device = next((d for d in map(_device, [match.view.tensor(v) for v in match.bindings.values()]) if d), None)
    if device is None or device.type != "cuda":
        where = device.type if device is not None else "this device"
        return f"on {where} no kernel of ours runs and Inductor fuses the same"
    from fxfuse.kernels.loader import library

    if library() is None:
        return "the kernel library is not available, and Inductor fuses the same"
    return None


def _device(tensor: torch.Tensor | None) -> torch.device | None:
    return tensor.device if tensor is not None else None
