// Accumulators that did not come out finite, again in plain float32, so that inf and NaN stand where such a product has them.
//
// The split makes inf - inf of an infinity, and infinity of a number next to FLT_MAX: whatever should be infinite or NaN is
// not finite after the tensor cores, and only that is computed again, by the thread that holds it.
#pragma once

#include <cstdint>

#include "../common.cuh"

namespace fxfuse::hopper {

// The operands as they lie in memory; element (row, k) of A at a[row * a_row + k * a_k], B likewise.
struct Float32Operands {
  const float *a, *b;
  int64_t a_row, a_k, b_row, b_k;
  int rows, columns, k;
};

// acc: 64 rows of a tile from (m, n) on, as wgmma leaves them, BN columns.
template <int BN>
__device__ __forceinline__ void float32_repair(const Float32Operands& p, float (&acc)[BN / 2], int m, int n, int thread) {
  float probe = 0.f;
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) probe = fmaf(0.f, acc[i], probe);
  if (probe == 0.f) return;
  const int lane = thread % kWarp, row = m + 16 * (thread / kWarp) + lane / 4;
  const float* const upper = p.a + min(row, p.rows - 1) * p.a_row;
  const float* const lower = p.a + min(row + 8, p.rows - 1) * p.a_row;
#pragma unroll
  for (int i = 0; i < BN / 8; ++i) {
    float* const d = acc + 4 * i;
    if (fmaf(0.f, d[0], fmaf(0.f, d[1], fmaf(0.f, d[2], 0.f * d[3]))) == 0.f) continue;
    const int column = n + 8 * i + 2 * (lane % 4);
    const float* const left = p.b + min(column, p.columns - 1) * p.b_row;
    const float* const right = p.b + min(column + 1, p.columns - 1) * p.b_row;
    float again[4] = {};
#pragma unroll 1
    for (int64_t k = 0; k < p.k; ++k) {
      const float u = upper[k * p.a_k], l = lower[k * p.a_k], x = left[k * p.b_k], y = right[k * p.b_k];
      again[0] = fmaf(u, x, again[0]);
      again[1] = fmaf(u, y, again[1]);
      again[2] = fmaf(l, x, again[2]);
      again[3] = fmaf(l, y, again[3]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) d[j] = again[j];
  }
}

}  // namespace fxfuse::hopper
