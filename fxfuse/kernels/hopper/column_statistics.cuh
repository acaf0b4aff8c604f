// Mean and sum of squared distances (M2) of every column over a warpgroup's 64 rows, from its accumulators.
//
// Pairs are merged by Chan's formula, never E[x^2] - E[x]^2, in a fixed order. Rows outside the matrix don't count.
#pragma once

#include "../common.cuh"
#include "barrier.cuh"
#include "wgmma.cuh"

namespace fxfuse::hopper {

template <int BN>
struct ColumnStatistics {
  // How two neighbours' columns merge, the same for every column: the other's share of the rows, and m n / (m + n).
  struct Weights {
    float share, cross;
  };
  static __device__ __forceinline__ Weights weights(float mine, float other) {
    const float all = mine + other;
    const float share = all > 0.f ? __fdividef(other, all) : 0.f;
    return {share, mine * share};
  }

  // acc: this thread's accumulators of a tile at (m, n). scratch: shared memory, [4 warps][BN]. partials[m / 64, column].
  static __device__ __forceinline__ void write(const float (&acc)[BN / 2], float2* scratch, float2* partials, int m, int n,
                                               int rows, int columns, int thread, int barrier) {
    const int warp = thread / kWarp, lane = thread % kWarp;
    const int row = m + 16 * warp + lane / 4;
    const float upper = row < rows ? 1.f : 0.f, lower = row + 8 < rows ? 1.f : 0.f;
    const Weights pair = weights(upper, lower);
    Weights level[3];
    float count = upper + lower;
#pragma unroll
    for (int l = 0; l < 3; ++l) {
      const float other = __shfl_xor_sync(0xffffffffu, count, 16 >> l);
      level[l] = weights(count, other);
      count += other;
    }

    // Eight lanes hold different rows of the same columns. Each step a lane hands half of its columns to its neighbour
    // and merges the other half, so that after three steps it owns one column of each eight.
#pragma unroll
    for (int group = 0; group < BN / 32; ++group) {
      float mean[8], m2[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* d = acc + 16 * group + 4 * (i / 2) + i % 2;
        const float delta = d[2] - d[0];
        mean[i] = fmaf(delta, pair.share, d[0]);
        m2[i] = delta * delta * pair.cross;
      }
#pragma unroll
      for (int l = 0; l < 3; ++l) {
        const int step = 16 >> l, half = 4 >> l;
        const bool second = lane & step;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float mine_mean = second ? mean[i + half] : mean[i], mine_m2 = second ? m2[i + half] : m2[i];
          const float other_mean = __shfl_xor_sync(0xffffffffu, second ? mean[i] : mean[i + half], step);
          const float other_m2 = __shfl_xor_sync(0xffffffffu, second ? m2[i] : m2[i + half], step);
          const float delta = other_mean - mine_mean;
          mean[i] = fmaf(delta, level[l].share, mine_mean);
          m2[i] = fmaf(delta * delta, level[l].cross, mine_m2 + other_m2);
        }
      }
      const int entry = (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
      scratch[warp * BN + 32 * group + 8 * (entry / 2) + 2 * (lane % 4) + entry % 2] = {mean[0], m2[0]};
    }
    named_barrier<kWarpgroup>(barrier);
    if (m < rows) {
#pragma unroll
      for (int c = thread; c < BN; c += kWarpgroup) {
        float2 total = scratch[c];
        float have = float(min(16, rows - m));
#pragma unroll
        for (int w = 1; w < 4; ++w) {
          const float more = float(max(0, min(16, rows - m - 16 * w)));
          const float2 next = scratch[w * BN + c];
          const Weights merge = weights(have, more);
          const float delta = next.x - total.x;
          total.x = fmaf(delta, merge.share, total.x);
          total.y = fmaf(delta * delta, merge.cross, total.y + next.y);
          have += more;
        }
        if (n + c < columns) partials[int64_t(m / kInstructionM) * columns + n + c] = total;
      }
    }
    named_barrier<kWarpgroup>(barrier);  // the scratch may be used again
  }
};

}  // namespace fxfuse::hopper
