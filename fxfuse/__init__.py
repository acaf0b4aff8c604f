"""fxfuse: a torch.fx graph-rewriting compiler pass with hand-written CUDA kernels.

``fxfuse.optimize(model)`` and ``torch.compile(model, backend="fxfuse")`` find computations that one kernel does far
better, replace exactly those, forward and backward, and leave the rest untouched.
"""

from __future__ import annotations

from fxfuse.api import optimize, report
from fxfuse.backend import backend, pre_grad_pass, reports
from fxfuse.explain import explain
from fxfuse.pattern import Pattern, Words, register, unregister

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
