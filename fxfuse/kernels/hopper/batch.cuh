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

// CONSUMERS warpgroups of a block: thread c of them merges column c of the tile.
template <int BN, int CONSUMERS>
class BatchExchange {
 public:
  static constexpr int kMostBlocks = 16;  // of 64 rows
  static constexpr int kThreads = CONSUMERS * kWarpgroup;
  static constexpr int kBarrier = 4;  // of all consumers
  static_assert(BN <= kThreads, "a column a thread");

  // Waits for `expected` warpgroups, then merges partials [ceil(rows / 64), columns]. known, maps: shared memory, (s, gamma,
  // beta) and room for (slope, shift) of each column of the tile. Returns the moments of the thread's column, for `record`.
  static __device__ __forceinline__ Moments finish(const TrainState& state, const float2* partials, const int* arrived,
                                                   int expected, const float4* known, float2* maps, int rows, int n,
                                                   int thread) {
    if (thread % kWarpgroup == 0)
      while (load_acquire(arrived) < expected) {
      }
    named_barrier<kThreads>(kBarrier);
    const int blocks = ceil_div(rows, kInstructionM), c = n + thread;
    Moments m{float(rows), 0.f, 0.f};
    if (thread < BN && c < state.columns) {
      // All partials at once, so that their loads overlap; then the mean, then squared distances from it.
      float2 part[kMostBlocks];
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b)
        part[b] = b < blocks ? __ldcg(partials + int64_t(b) * state.columns + c) : make_float2(0.f, 0.f);
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b) m.mean = fmaf(block_rows(rows, b), part[b].x, m.mean);
      m.mean /= m.count;
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b) {
        const float delta = part[b].x - m.mean;
        m.m2 += fmaf(delta * delta, block_rows(rows, b), part[b].y);
      }
      const ColumnMap map = state.map(about(known, thread), m);
      maps[thread] = {map.g, fmaf(map.e, map.g, map.b)};
    }
    named_barrier<kThreads>(kBarrier);
    return m;
  }

  // The column's statistics for whoever comes later: each of the `blocks` of a column of tiles has its share of them.
  static __device__ __forceinline__ void record(const TrainState& state, const float4* known, const Moments& m, int n, int block,
                                                int blocks, int thread) {
    if (thread < BN && n + thread < state.columns && thread * blocks / BN == block)
      state.record(n + thread, about(known, thread), m);
  }

 private:
  static __device__ __forceinline__ TrainState::Known about(const float4* known, int thread) {
    const float4 k = known[thread];
    return {k.x, k.y, k.z};
  }
  static __device__ __forceinline__ float block_rows(int rows, int block) {
    return float(max(0, min(kInstructionM, rows - block * kInstructionM)));
  }
};

}  // namespace fxfuse::hopper
