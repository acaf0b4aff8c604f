// A batch's statistics inside the GEMM: every warpgroup publishes those of its rows, waits for the others that work on the
// same columns, and merges them all while its accumulators stay in registers. Then the tile is normalised as it is written.
//
// The blocks of a column of tiles must run at the same time: the launch is cooperative, and a round of the persistent grid
// holds whole columns (see TileOrder and launch_gemm).
#pragma once

#include "../batchnorm_columns.cuh"
#include "behind.cuh"
#include "wgmma.cuh"

namespace fxfuse::hopper {

template <int BN>
class BatchExchange {
 public:
  static constexpr int kOwn = BN / kWarpgroup;  // columns that a thread merges
  static constexpr int kMostBlocks = 16;        // of 64 rows

  // Waits for `expected` warpgroups, then merges partials [ceil(rows / 64), columns]. known, maps: shared memory, (s, gamma,
  // beta) and room for (slope, shift) of each column of the tile. `record`: this warpgroup also updates the running
  // statistics.
  static __device__ __forceinline__ void finish(const TrainState& state, const float2* partials, const int* arrived,
                                                int expected, const float4* known, float2* maps, int rows, int n,
                                                bool record, int thread, int barrier) {
    if (thread == 0)
      while (load_acquire(arrived) < expected) {
      }
    named_barrier<kWarpgroup>(barrier);
    const int blocks = ceil_div(rows, kInstructionM);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int c = n + thread + i * kWarpgroup;
      if (c >= state.columns) continue;
      // All partials at once, so that their loads overlap; then the mean, then squared distances from it.
      float2 part[kMostBlocks];
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b)
        part[b] = b < blocks ? __ldcg(partials + int64_t(b) * state.columns + c) : make_float2(0.f, 0.f);
      Moments m{float(rows), 0.f, 0.f};
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b) m.mean = fmaf(block_rows(rows, b), part[b].x, m.mean);
      m.mean /= m.count;
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b) {
        const float delta = part[b].x - m.mean;
        m.m2 += fmaf(delta * delta, block_rows(rows, b), part[b].y);
      }
      const float4 k = known[thread + i * kWarpgroup];
      const TrainState::Known about{k.x, k.y, k.z};
      const ColumnMap map = state.map(about, m);
      maps[thread + i * kWarpgroup] = {map.g, fmaf(map.e, map.g, map.b)};
      if (record) state.record(c, about, m);
    }
    named_barrier<kWarpgroup>(barrier);
  }

 private:
  static __device__ __forceinline__ float block_rows(int rows, int block) {
    return float(max(0, min(kInstructionM, rows - block * kInstructionM)));
  }
};

}  // namespace fxfuse::hopper
