"""The tile order of the Hopper GEMM, on the CPU: every tile once, in the order that the header promises."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fxfuse.kernels import build

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

PROGRAM = r"""
#define __device__
#define __host__
#define __forceinline__ inline
#include "hopper/scheduler.cuh"

#include <cstdio>
#include <vector>

using namespace fxfuse::hopper;

int failures = 0;
void expect(bool holds, const char* what, int a, int b, int c) {
  if (!holds && ++failures < 10) std::printf("%s: %d %d %d\n", what, a, b, c);
}

void every_tile_once(const TileOrder& order, int rows, int columns, int most) {
  std::vector<int> seen(order.count());
  for (int i = 0; i < order.count(); ++i) {
    const Tile tile = order.at(i);
    const bool inside = tile.m >= 0 && tile.m < rows && tile.n >= 0 && tile.n < columns;
    expect(inside, "outside", rows, columns, most);
    if (inside) ++seen[tile.m * columns + tile.n];
  }
  for (int count : seen) expect(count == 1, "not once", rows, columns, most);
}

int main() {
  for (int by : {1, 2, 3, 5, 7, 64, 127, 128, 4095, 4096, 65537, 1 << 30, 0x7fffffff}) {
    const Divider divide(by);
    const int64_t most = 0x7fffffff;
    for (int64_t near : {int64_t(0), int64_t(by), int64_t(by) * 2, most / by * by, most})
      for (int64_t n = near - 2; n <= near + 2; ++n)
        if (n >= 0 && n <= most) expect(divide(int(n)) == n / by, "quotient", int(n), by, divide(int(n)));
  }
  for (int rows = 1; rows < 20; ++rows)
    for (int columns = 1; columns < 20; ++columns)
      for (int most = 1; most < 9; ++most) {
        every_tile_once(TileOrder::by_rows(rows, columns, most), rows, columns, most);
        for (bool alone : {false, true}) {
          const TileOrder order = TileOrder::by_columns(rows, columns, most, alone);
          every_tile_once(order, rows, columns, most);
          // Whole bands one after the other, none wider than `most`, the wide ones first, and the last column by itself
          // where it is to be; every other band upwards.
          const int others = alone && columns > 1 ? columns - 1 : columns, bands = (others + most - 1) / most;
          for (int i = 0, first = 0, band = 0; band < bands + (others < columns); ++band) {
            const int width = band == bands ? 1 : others / bands + (band < others % bands);
            expect(width <= most, "wide", rows, columns, most);
            for (int j = 0; j < rows * width; ++j, ++i) {
              const Tile tile = order.at(i);
              expect(tile.n == first + j % width, "column", rows, columns, i);
              expect(tile.m == (band % 2 ? rows - 1 - j / width : j / width), "row", rows, columns, i);
            }
            first += width;
          }
        }
      }
  return failures != 0;
}
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_tile_comes_once_and_columns_are_whole_early(tmp_path: Path) -> None:
    (tmp_path / "order.cpp").write_text(PROGRAM)
    program = tmp_path / "order"
    subprocess.run(
        [str(COMPILER), "-std=c++17", "-O1", f"-I{build.KERNELS}", "-o", str(program), str(tmp_path / "order.cpp")],
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
