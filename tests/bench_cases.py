"""Small cases of the bench's workloads, and how they are measured in its tests."""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.bench import measure
from fxfuse.bench.cases import Case
from fxfuse.bench.workloads import WORKLOADS

CPU = torch.device("cpu")
TINY = {"M,N,K": (8, 6, 5), "M,N": (8, 6)}


def tiny(name: str, mode: str = "fwd") -> Case:
    workload = WORKLOADS[name]
    return Case(workload, TINY[workload.dims], "fp32", mode)


def effort(**changes: Any) -> measure.Effort:
    return measure.Effort(**{"device": CPU, "seed": 0, "rounds": 3, "cache_bytes": 0, **changes})
