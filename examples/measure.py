"""Time a model before and after: ``python examples/measure.py gated_residual:GatedResidual 8192 512`` (rows, width)."""

import importlib
import inspect
import sys

import torch

import fxfuse
from fxfuse.bench.timing import time_together


def main(target: str, rows: int, width: int) -> None:
    module, _, name = target.partition(":")
    model = getattr(importlib.import_module(module), name)(width)  # importing it registers its pattern
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tuple(torch.randn(rows, width, device=device) for _ in inspect.signature(model.forward).parameters)
    fused = fxfuse.optimize(model.to(device), inputs, verify=True)
    print(fxfuse.report(fused))
    with torch.no_grad():
        steps = {"eager": lambda i: model(*inputs), "fxfuse": lambda i: fused(*inputs)}
        for which, timing in time_together(steps, device, rounds=15).items():
            print(f"{which:7} {timing.median_ms:.3f} ms")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
