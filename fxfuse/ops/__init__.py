"""The fused ops: one file an op, found by name and imported on first use.

>>> from fxfuse import ops
>>> ops.names()
['distillation_kl', 'kl_div', ...]
>>> ops.get("kl_div").call(log_p, target, reduction="sum")
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._op import Op

__all__ = ["get", "names"]


def names() -> list[str]:
    """The names of the ops of this package, sorted. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@functools.cache
def get(name: str) -> Op:
    """The `Op` of that name: `.name`, `.schema`, `.call`, `.reference`, `.road`.

    Raises KeyError with the known names when there is no such op.
    """
    known = names()
    if name not in known:
        raise KeyError(f"no op named {name!r}; the ops are {', '.join(known)}")
    op: Op = importlib.import_module(f"{__name__}.{name}").OP
    return op
