"""fxfuse: a torch.fx graph-rewriting compiler pass with hand-written CUDA kernels.

``fxfuse.optimize(model)`` and ``torch.compile(model, backend="fxfuse")`` find computations that one kernel does far
better, replace exactly those, forward and backward, and leave the rest untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxfuse.api import optimize, report
from fxfuse.backend import backend, pre_grad_pass, reports
from fxfuse.pattern import Pattern, Words, register, unregister

if TYPE_CHECKING:
    from fxfuse.explanation import explain

__version__ = "0.1.0"
__all__ = [
    "Pattern",
    "Words",
    "backend",
    "explain",
    "optimize",
    "pre_grad_pass",
    "register",
    "report",
    "reports",
    "unregister",
]


def __getattr__(name: str) -> Any:
    # a story is told once in a while and needs a fifth of all imports: it is fetched when it is first asked for
    if name == "explain":
        from fxfuse.explanation import explain

        globals()[name] = explain
        return explain
    raise AttributeError(f"module 'fxfuse' has no attribute {name!r}")
