"""kl_div and distillation_kl kernels alone, on a CUDA device: right against float64, then timed beside the ceiling.

Calls the C functions directly, so that what is measured is the kernels and not the ops around them:

    python benchmarks/device_kl.py [--skip-checks] [--skip-times] [--compare] [--out FILE]

Checks compare with float64 and with eager in the same dtype: norm-wise error at most 1.25 times eager's, over
sixteen draws where one holds few numbers. Times are
medians of CUDA events; the read ceiling is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from device_kl_calls import lib
from device_kl_checks import Checks, check_distillation, check_kl, huge, streams_and_graphs
from device_kl_times import call_overhead, ceilings, times
from tabulate import tabulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--compare", action="store_true", help="time eager and torch.compile too")
    parser.add_argument("--out", help="JSON file for every number")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, lib, "portable" if os.environ.get("FXFUSE_PORTABLE") else "")
    failed = False
    if not options.skip_checks:
        start = time.perf_counter()
        checks = Checks()
        check_kl(checks)
        failed |= checks.report("kl_div")
        checks = Checks()
        check_distillation(
            checks,
            [(3, 10), (65, 512), (17, 1000), (33, 1024), (9, 5003), (6, 32000), (5, 50257)],
            roads=(0, 2, 3),
            kinds=("plain", "offset", "temperatures", "cold", "large", "masked", "special"),
        )
        check_distillation(checks, [(300, 4096), (5, 128256), (3, 200003), (2, 1_000_000)], roads=(0, 3))
        failed |= checks.report("distillation_kl")
        streams_and_graphs()
        if not os.environ.get("FXFUSE_PORTABLE"):
            huge()
        print(f"checks took {time.perf_counter() - start:.1f} s", flush=True)
    rows: list[list[Any]] = []
    if not options.skip_times:
        ceiling = ceilings()
        overhead = call_overhead()
        times(rows, ceiling, options.compare)
        print("ceilings, TB/s:", {k: round(v, 3) for k, v in ceiling.items()})
        print(tabulate(rows, ["what", "ms", "limit", "% of limit", "bar", "eager", "compile"], floatfmt=".4g"))
        print(tabulate(overhead.items(), ["host time of a call", "us"], floatfmt=".2f"))
        if options.out:
            machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
            Path(options.out).write_text(
                json.dumps({"machine": machine, "ceilings": ceiling, "overhead_us": overhead, "rows": rows}, indent=1)
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
