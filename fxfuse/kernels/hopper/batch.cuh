// A batch's statistics inside the GEMM: every warpgroup publishes those of its rows, waits for the others that work on the
// same columns, and merges them all while its accumulators stay in registers. Then the tile is normalised as it is written.
//
// The blocks of a column of tiles must run at the same time: the launch is cooperative, and a round of the persistent grid
// holds whole columns (see TileOrder and launch_gemm).
#pragma once

#include "../batchnorm_columns.cuh"
#include "behind.cuh"
#include "column_statistics.cuh"
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

  // What a thread knows of its column of the tile.
  struct Column {
    TrainState::Known known;
    TrainState::Before before;
    Moments moments;
  };
  // The column's statistics are for whoever comes later; each of the `blocks` of a column of tiles records its share.
  static __device__ __forceinline__ bool records(const TrainState& state, int n, int block, int blocks, int thread) {
    return thread < BN && n + thread < state.columns && thread * blocks / BN == block;
  }

  // Waits for `expected` warpgroups, then merges partials [ceil(rows / 64), columns]. maps: shared memory, room for (slope,
  // shift) of each column of the tile.
  static __device__ __forceinline__ Column finish(const TrainState& state, const float2* partials, const int* arrived,
                                                  int expected, float2* maps, int rows, int n, bool records, int thread) {
    const int blocks = ceil_div(rows, kInstructionM), c = n + thread;
    const bool mine = thread < BN && c < state.columns;
    Column column{{}, {}, {float(rows), 0.f, 0.f}};
    Moments& m = column.moments;
    if (thread % kWarpgroup == 0)
      while (load_acquire(arrived) < expected) {
      }
    named_barrier<kThreads>(kBarrier);
    if (mine) {
      // All loads at once, so that they overlap; then the mean, then squared distances from it.
      column.known = state.known(c);
      if (records) column.before = state.before(c);
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
      const ColumnMap map = state.map(column.known, m);
      maps[thread] = {map.g, fmaf(map.e, map.g, map.b)};
    }
    named_barrier<kThreads>(kBarrier);
    return column;
  }

  // Waits for `expected` blocks, then brings the maps [columns] that they merged to shared memory.
  static __device__ __forceinline__ void fetch(const int* merged, int expected, const float2* merged_maps, float2* maps,
                                               int columns, int n, int thread) {
    if (thread % kWarpgroup == 0)
      while (load_acquire(merged) < expected) __nanosleep(100);
    named_barrier<kThreads>(kBarrier);
    if (thread < BN && n + thread < columns) maps[thread] = __ldcg(merged_maps + n + thread);
    named_barrier<kThreads>(kBarrier);
  }

 private:
  static __device__ __forceinline__ float block_rows(int rows, int block) {
    return float(max(0, min(kInstructionM, rows - block * kInstructionM)));
  }
};

}  // namespace fxfuse::hopper
