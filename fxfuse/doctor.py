"""What this machine can do for fxfuse: versions, GPU, kernels, and the road each op takes and why.

``examine()`` looks at the machine; ``diagnose(model, example_inputs)`` at one model on it. Both give text for a person.
"""

from __future__ import annotations

import contextlib
import os
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxfuse
from fxfuse import ops
from fxfuse.bench import machine
from fxfuse.bench.cases import Case, Setup
from fxfuse.bench.limits import PRECISION_DTYPE
from fxfuse.bench.workloads import WORKLOADS
from fxfuse.kernels import build, loader

DTYPES = tuple(dict.fromkeys((*PRECISION_DTYPE.values(), torch.float64)))
SAMPLE = {"M,N,K": (256, 512, 384), "M,N": (1024, 4096)}  # above the sizes that are too small to be worth a road
Call = tuple[str, str, str]  # op, road, why


class RoadRecorder(TorchFunctionMode):
    """While active, notes the road of every fxfuse op that is called, in `calls`, and lets the call go its way."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._ops = {op.call: op for op in map(ops.get, ops.names())}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = self._ops.get(func)
        if op is not None:
            road = op.road(*args, **kwargs)
            self.calls.append((op.name, road.name, road.why))
        return func(*args, **kwargs)


def examine() -> str:
    """The machine as a table, then the road each op takes for each dtype: with a GPU there, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = tabulate(_facts(device), tablefmt="plain", disable_numparse=True)
    return f"{facts}\n\nRoads on {_device_name(device)}\n{_table(_roads(device), ('op', 'dtype', 'road', 'because'))}"


def diagnose(model: nn.Module, example_inputs: Any) -> str:
    """The road of every replacement in `model` for these inputs, and what came near and was left alone.

    Args:
        model: any module; a model that `fxfuse.optimize` made already is taken as it is. It is run once, without
            gradients, on a copy of its buffers.
        example_inputs: as `fxfuse.optimize` takes them: a tensor, a tuple of arguments or a dict of keywords.

    Raises:
        TypeError, ValueError: for inputs of a wrong type or that do not run through the model.
    """
    with contextlib.suppress(TypeError, ValueError):
        fxfuse.report(model)
        return _diagnosis(model, example_inputs)
    return _diagnosis(fxfuse.optimize(model, example_inputs), example_inputs)


def _diagnosis(fused: Any, example_inputs: Any) -> str:
    args, kwargs = _arguments(example_inputs)
    report = fxfuse.report(fused)
    with _untouched_buffers(fused), RoadRecorder() as recorder, torch.no_grad():
        fused(*args, **kwargs)

    # Calls come in the order of execution; a replacement is told apart by its op and its turn among that op's.
    waiting: dict[str, list[str]] = {}
    for replacement in report.replacements:
        waiting.setdefault(replacement.op, []).append(replacement.where or "(the model)")
    rows = []
    for name, road, why in recorder.calls:
        places = waiting.get(name, [])
        rows.append((name, places.pop(0) if places else "called again", road, why))
    rows += [(name, place, "not called", "these inputs do not reach it") for name in waiting for place in waiting[name]]
    rows += [(miss.pattern, miss.node, "left alone", miss.reason) for miss in report.near_misses]
    heading = f"fxfuse · {report.title or type(fused).__name__} · the roads of its replacements for these inputs"
    if not rows:
        return f"{heading}\nnothing is replaced in it, and nothing came near"
    return f"{heading}\n{_table(rows, ('op', 'in', 'road', 'because'))}"


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(f"example_inputs is a tensor, a tuple or a dict, not {type(example_inputs).__name__}")


@contextlib.contextmanager
def _untouched_buffers(model: Any) -> Iterator[None]:
    """Running statistics and counters as they were, after a call in train mode."""
    kept = [(b, b.detach().clone()) for b in model.buffers()] if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def _facts(device: torch.device) -> list[tuple[str, str]]:
    """The machine: (what, value)."""
    facts = [
        ("fxfuse", fxfuse.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, built " + (f"with CUDA {torch.version.cuda}" if torch.version.cuda
                                                    else "without CUDA")),
        ("driver", machine.driver_version() or "no NVIDIA driver answers (nvidia-smi)"),
        ("GPU", _device_name(device) if device.type == "cuda" else "torch sees no CUDA device"),
        ("nvcc", _nvcc()),
        ("kernels", _kernels(device)),
        ("kernel cache", str(loader.cache_dir())),
    ]  # fmt: skip
    switches = sorted(name for name in os.environ if name.startswith("FXFUSE_"))
    facts += [(name, os.environ[name]) for name in switches]
    return [(name, textwrap.fill(value, 66, break_on_hyphens=False)) for name, value in facts]


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the CPU ({machine.cpu_name()})"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / (1 << 30)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"


def _nvcc() -> str:
    nvcc = build.find_nvcc()
    if nvcc is None:
        return "not found (needed only where no prebuilt or cached library fits)"
    try:
        return f"{build.nvcc_version(nvcc)} ({nvcc})"
    except build.BuildError as error:
        return str(error)


def _kernels(device: torch.device) -> str:
    """Which library is loaded and from where. Loads it on a machine with a GPU, as the first op would."""
    if device.type != "cuda":
        shipped = build.library_is_whole(loader.PREBUILT, build.source_key())
        return "not loaded, they need a GPU; " + ("prebuilt in this package" if shipped else "not prebuilt here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason stands in the table
        library = loader.library()
    return f"{library.origin}: {library.path}" if library else f"none: {loader.why_unavailable()}"


def _roads(device: torch.device) -> list[tuple[str, str, str, str]]:
    """(op, dtypes, road, why) for every op, rows of the same road and reason put together."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    seen = set()
    for workload in WORKLOADS.values():
        for dtype in DTYPES:
            for name, road, why in _sample_calls(workload.name, dtype, device):
                seen.add(name)
                dtypes = grouped.setdefault((name, road, why), [])
                label = str(dtype).removeprefix("torch.")
                if label not in dtypes:
                    dtypes.append(label)
    rows = [
        (name, "every" if len(dtypes) == len(DTYPES) else ", ".join(dtypes), road, why)
        for (name, road, why), dtypes in sorted(grouped.items())
    ]
    elsewhere = "fxfuse doctor MODULE:NAME --input SHAPE shows it in a model"
    return rows + [(name, "", "depends", elsewhere) for name in ops.names() if name not in seen]


def _sample_calls(workload_name: str, dtype: torch.dtype, device: torch.device) -> list[Call]:
    """The calls that one of the bench's models makes, fused, in `dtype` on `device`."""
    workload = WORKLOADS[workload_name]
    setup = Setup.make(Case(workload, SAMPLE[workload.dims], "fp32", "fwd"), device, seed=0, cache_bytes=0)
    fused = fxfuse.optimize(setup.model.to(dtype))
    with RoadRecorder() as recorder:
        try:
            fused(*(x.to(dtype) for x in setup.input_sets[0]))
        except RuntimeError as error:  # eager PyTorch has no half-precision product on some CPUs, say
            recorder.calls.append((fxfuse.report(fused).replacements[0].op, "fails", str(error).split("\n")[0]))
    return recorder.calls


def _table(rows: Sequence[tuple[str, ...]], headings: tuple[str, ...]) -> str:
    """A table of at most 80 columns: the last column is wrapped to what the others leave."""
    cells = [tuple(_wrap(cell, 27) for cell in row[:-1]) for row in rows]
    widths = [  # tabulate makes a column two wider than its heading
        max(len(heading) + 2, *(len(line) for row in cells for line in row[i].split("\n")))
        for i, heading in enumerate(headings[:-1])
    ]
    left = max(20, 80 - sum(widths) - 2 * len(widths))
    lines = [(*cell, _wrap(row[-1], left)) for cell, row in zip(cells, rows, strict=True)]
    return tabulate(lines, headings, tablefmt="simple", disable_numparse=True)


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or ""
