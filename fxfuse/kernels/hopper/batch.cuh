// A batch's statistics inside the GEMM: every block (or warpgroup) publishes those of its rows, waits for the others that
// work on the same columns, and merges them all while its accumulators stay in registers. Then the tile is normalised as it
// is written.
//
// The blocks of a column of tiles must run at the same time: the launch is cooperative, and a round of the persistent grid
// holds whole columns (see TileOrder and launch_gemm).
#pragma once

#include "../batchnorm_columns.cuh"
#include "behind.cuh"
#include "column_statistics.cuh"
#include "wgmma.cuh"

namespace fxfuse::hopper {

constexpr int kMostBatchRows = 1024;

// Among blocks of CONSUMERS warpgroups, of partials of ROWS rows each: thread c of a block merges column c of the tile.
template <int BN, int CONSUMERS, int ROWS>
class BatchExchange {
 public:
  static constexpr int kThreads = CONSUMERS * kWarpgroup;
  static_assert(BN <= kThreads, "a column a thread");

  // What a thread knows of its column of the tile.
  struct Column {
    TrainState::Known known{};
    TrainState::Before before{};
    Moments moments{};
    bool records = false;  // the column's statistics, for whoever comes later: each block of a column of tiles does for its share
  };
  // Of the tile's column `thread`, in block number `block` of `blocks` below each other.
  static __device__ __forceinline__ Column column(const TrainState& state, int n, int block, int blocks, int thread) {
    Column column;
    if (thread >= BN || n + thread >= state.columns) return column;
    column.records = thread * blocks / BN == block;
    column.known = state.known(n + thread);
    if (column.records) column.before = state.before(n + thread);
    return column;
  }

  // The same by way of shared memory, where other warps have put it while the product was under way.
  struct Prepared {
    float s[BN], gamma[BN], beta[BN], bias[BN], mean[BN], var[BN];
  };
  static __device__ __forceinline__ void prepare(Prepared& to, const TrainState& state, int n, int i) {
    if (n + i >= state.columns) return;
    const auto known = state.known(n + i);
    const auto before = state.before(n + i);
    to.s[i] = known.s, to.gamma[i] = known.gamma, to.beta[i] = known.beta;
    to.bias[i] = before.bias, to.mean[i] = before.mean, to.var[i] = before.var;
  }
  static __device__ __forceinline__ Column column(const Prepared& from, const TrainState& state, int n, int block, int blocks,
                                                  int thread) {
    Column column;
    if (thread >= BN || n + thread >= state.columns) return column;
    column.records = thread * blocks / BN == block;
    column.known = {from.s[thread], from.gamma[thread], from.beta[thread]};
    column.before = {from.bias[thread], from.mean[thread], from.var[thread]};
    return column;
  }

  // Waits for `expected` arrivals, then merges partials [ceil(rows / ROWS), columns]. maps: shared memory, room for (slope,
  // shift) of each column of the tile.
  static __device__ __forceinline__ void finish(Column& column, const TrainState& state, const float2* partials,
                                                const int* arrived, int expected, float2* maps, int rows, int n, int thread) {
    constexpr int kMost = kMostBatchRows / ROWS;
    const int blocks = ceil_div(rows, ROWS), c = n + thread;
    if (thread % kWarpgroup == 0)
      while (load_acquire(arrived) < expected) {
      }
    named_barrier<kThreads>(kConsumersBarrier);
    if (thread < BN && c < state.columns) {
      // All loads at once, so that they overlap; then the mean, then squared distances from it.
      float2 part[kMost];
#pragma unroll
      for (int b = 0; b < kMost; ++b)
        part[b] = b < blocks ? __ldcg(partials + int64_t(b) * state.columns + c) : make_float2(0.f, 0.f);
      const float whole = float(rows) / ROWS;  // blocks, and a part of one
      Moments m{float(rows), 0.f, 0.f};
#pragma unroll
      for (int b = 0; b < kMost; ++b) m.mean = fmaf(__saturatef(whole - float(b)), part[b].x, m.mean);
      m.mean /= whole;
#pragma unroll
      for (int b = 0; b < kMost; ++b) {
        const float delta = part[b].x - m.mean;
        m.m2 += fmaf(delta * delta, ROWS * __saturatef(whole - float(b)), part[b].y);
      }
      const ColumnMap map = state.map(column.known, m);
      maps[thread] = {map.g, fmaf(map.e, map.g, map.b)};
      column.moments = m;
    }
    named_barrier<kThreads>(kConsumersBarrier);
  }
  static __device__ __forceinline__ void record(const Column& column, const TrainState& state, int n, int thread) {
    if (column.records) state.record(n + thread, column.known, column.before, column.moments);
  }

  // Waits for `expected` blocks, then brings the maps [columns] that they merged to shared memory.
  static __device__ __forceinline__ void fetch(const int* merged, int expected, const float2* merged_maps, float2* maps,
                                               int columns, int n, int thread) {
    if (thread % kWarpgroup == 0)
      while (load_acquire(merged) < expected) __nanosleep(50);
    named_barrier<kThreads>(kConsumersBarrier);
    if (thread < BN && n + thread < columns) maps[thread] = __ldcg(merged_maps + n + thread);
    named_barrier<kThreads>(kConsumersBarrier);
  }
};

}  // namespace fxfuse::hopper
