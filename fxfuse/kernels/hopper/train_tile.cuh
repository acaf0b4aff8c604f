// What stands behind a training tile's product: its statistics, those of the whole batch, and the normalised tile.
#pragma once

#include "batch.cuh"
#include "column_statistics.cuh"
#include "epilogue.cuh"
#include "problem.cuh"
#include "tile_statistics.cuh"

namespace fxfuse::hopper {

// With a column's slope and shift. What was measured is what is normalised, as Out has it: a column that rounding leaves hardly
// any spread would else be off by rounding's error, times one over that spread.
template <typename Out>
struct Normalise {
  __device__ __forceinline__ float operator()(float x, float2 column) const {
    return fmaf(rounded<Out>(x), column.x, column.y);
  }
};

// Column statistics of a warpgroup's rows; the staging buffers are scratch for a moment.
template <typename Mainloop, typename Epilogue, typename Writer>
__device__ __forceinline__ void statistics(uint8_t* storage, const float (&acc)[Mainloop::kAccumulators],
                                           const Problem<Mainloop, Epilogue>& problem, int m, int n, int consumer,
                                           int thread) {
  static_assert(Writer::kSharedBytes >= 4 * Mainloop::kBlockN * int(sizeof(float2)), "the scratch is too small");
  if (thread % kWarp == 0) tma_store_wait_read<0>();
  named_barrier<kWarpgroup>(1 + consumer);
  uint8_t* const scratch = storage + SharedLayout<Mainloop, Writer, Epilogue>::kStaging + consumer * Writer::kSharedBytes;
  ColumnStatistics<Mainloop::kBlockN>::write(acc, reinterpret_cast<float2*>(scratch), problem.epilogue.partials, m, n,
                                             problem.rows, problem.columns, thread, 1 + consumer);
}

// A mainloop that prepares has each tile's statistics published by warpgroups; else blocks do for their last one.
template <typename Mainloop>
using Exchange = BatchExchange<Mainloop::kBlockN, Mainloop::kConsumers, Mainloop::kPrepares ? kPartialRows : Mainloop::kBlockM>;

// What is left of a tile whose epilogue needs the statistics of the whole batch, once its own are published, where all of
// the batch is in this round: from its accumulators, by batch.cuh. For mainloops that prepare.
template <typename Mainloop, typename Epilogue, typename Writer>
__device__ __forceinline__ void finish_batch(uint32_t shared, uint8_t* storage,
                                             float (&acc)[Mainloop::kHalves][Mainloop::kAccumulators],
                                             const Problem<Mainloop, Epilogue>& problem, const CUtensorMap* map_out,
                                             const CUtensorMap* map_kept, const Tile& tile,
                                             typename Exchange<Mainloop>::Column& column, int m, int n, int consumer, int thread) {
  using Layout = SharedLayout<Mainloop, Writer, Epilogue>;
  const auto& p = problem.epilogue;
  const uint32_t staging = shared + Layout::kStaging + consumer * Writer::kSharedBytes;
  float2* const maps = reinterpret_cast<float2*>(storage + Layout::kColumns);
  const int warpgroups = problem.order.rows * Mainloop::kCluster * Mainloop::kConsumers, one = consumer * kWarpgroup + thread;
  const auto write = [&](auto columns, const auto& apply, const CUtensorMap* map) {
#pragma unroll
    for (int half = 0; half < Mainloop::kHalves; ++half)
      Writer::template write<decltype(columns)::value>(apply, acc[half], maps, staging, map,
                                                       m + Mainloop::row(consumer, half), n, thread);
  };
  if constexpr (Epilogue::kKeep) write(std::false_type{}, Identity::Apply{}, map_kept);
  Exchange<Mainloop>::finish(column, p.state, p.partials, p.counters.arrived(tile.n), warpgroups, maps, problem.rows, n, one);
  write(std::true_type{}, Normalise<float>{}, map_out);
  Exchange<Mainloop>::record(column, p.state, n, one);
  named_barrier<Exchange<Mainloop>::kThreads>(kConsumersBarrier);  // the maps are free
}

// In the second half of the first warpgroup's staging: the first is for statistics.
template <typename Mainloop, typename Epilogue, typename Writer>
__device__ __forceinline__ auto& prepared_columns(uint8_t* storage) {
  using Prepared = typename Exchange<Mainloop>::Prepared;
  constexpr int kHalf = Writer::kSharedBytes / 2;
  static_assert(Mainloop::kBlockN * int(sizeof(float2)) <= kHalf && int(sizeof(Prepared)) <= kHalf);
  return *reinterpret_cast<Prepared*>(storage + SharedLayout<Mainloop, Writer, Epilogue>::kStaging + kHalf);
}

// Where a block's last tile lies whole in the ring's memory, which no product needs after it: each warpgroup's rows in a
// stage that has been read, or side by side.
template <typename Mainloop, typename Whole>
struct LastTile {
  static constexpr bool kStages = Whole::kSharedBytes <= Mainloop::kStageBytes;
  static_assert(kStages || Mainloop::kConsumers * Whole::kSharedBytes <= Mainloop::kSharedBytes, "the ring is too small");
  // `next`: the stage after the one that was filled last.
  static __device__ __forceinline__ int at(int next, int consumer) {
    return kStages ? (next + consumer) % Mainloop::kStages * Mainloop::kStageBytes : consumer * Whole::kSharedBytes;
  }
};

// The whole of a block's last tile behind its product, where the others are worked on behind the tensor cores. EXCHANGED, by
// the tile's turn: its columns are in this round, and each block merges their statistics; else the warps behind the tensor
// cores do. The product itself, where it is kept, is written by the producer, once all warps have arrived at `laid`.
template <typename Out, typename Mainloop, typename Epilogue, typename Writer>
__device__ __forceinline__ void finish_last(const typename Mainloop::Pipeline& ring, uint32_t shared, uint8_t* storage,
                                            float (&acc)[Mainloop::kAccumulators], const Problem<Mainloop, Epilogue>& problem,
                                            const CUtensorMap* map_out, const Tile& tile, int m, int n, int consumer, int thread,
                                            bool exchanged) {
  using Layout = SharedLayout<Mainloop, Writer, Epilogue>;
  using Whole = TileWriter<Out, Mainloop::kBlockN, Writer::kChunks>;
  using Last = LastTile<Mainloop, Whole>;
  constexpr int kThreads = Exchange<Mainloop>::kThreads;
  const auto& p = problem.epilogue;
  const int one = consumer * kWarpgroup + thread, blocks = problem.order.rows * Mainloop::kCluster;
  const int first = m + Mainloop::row(consumer, 0), rows = problem.rows - first;
  const uint32_t staging = shared + Layout::kStaging + consumer * Writer::kSharedBytes;
  float2* const maps = reinterpret_cast<float2*>(storage + Layout::kColumns);
  const auto measured = [&](int of) { return reinterpret_cast<float2*>(storage + Layout::kStaging + of * Writer::kSharedBytes); };

  typename Exchange<Mainloop>::Column column;
  const int tile_at = Last::at(ring.stage(), consumer);
  if constexpr (Last::kStages) {
    auto own = ring;  // whose state stays one for all warps
    if (consumer == 1) own.advance();
    own.wait_free();
  } else {
    named_barrier<kThreads>(kConsumersBarrier);  // all have read the ring
  }
  Whole::lay(acc, shared + tile_at, thread);
  if constexpr (Epilogue::kKeep) {
    fence_async_proxy();
    __syncwarp();
    if (thread % kWarp == 0) mbarrier_arrive(shared + Layout::kLaid);
  }
  named_barrier<kWarpgroup>(1 + consumer);
  if (exchanged) {  // of the block's rows together: half as much to read for everybody
    TileStatistics<Out, Whole>::write(storage + tile_at, measured(consumer), min(kPartialRows, rows), Mainloop::kBlockN, thread);
    named_barrier<kThreads>(kConsumersBarrier);
    const int count = min(Mainloop::kBlockM, problem.rows - m);
    if (count > 0 && one < Mainloop::kBlockN && n + one < problem.columns) {
      float2 whole = measured(0)[one];
      if (count > kPartialRows) {
        const float2 more = measured(1)[one];
        const Moments both = merge({float(kPartialRows), whole.x, whole.y}, {float(count - kPartialRows), more.x, more.y});
        whole = {both.mean, both.m2};
      }
      p.partials[int64_t(m / Mainloop::kBlockM) * problem.columns + n + one] = whole;
    }
    named_barrier<kThreads>(kConsumersBarrier);
    if (one == 0) arrive_release(p.counters.arrived(tile.n));
    mbarrier_wait(shared + Layout::kColumnsFull, 0);
    column = Exchange<Mainloop>::column(prepared_columns<Mainloop, Epilogue, Writer>(storage), p.state, n, m / Mainloop::kBlockM,
                                        blocks, one);
    Exchange<Mainloop>::finish(column, p.state, p.partials, p.counters.arrived(tile.n), blocks, maps, problem.rows, n, one);
  } else {
    TileStatistics<Out, Whole>::write(storage + tile_at, p.partials + int64_t(first / kPartialRows) * problem.columns + n,
                                      min(kPartialRows, rows), problem.columns - n, thread);
    named_barrier<kWarpgroup>(1 + consumer);
    if (thread == 0) arrive_release(p.counters.arrived(tile.n));
    Exchange<Mainloop>::fetch(p.counters.merged(tile.n), blocks, p.maps, maps, problem.columns, n, one);
  }
  if (thread % kWarp == 0) mbarrier_arrive(shared + Layout::kThrough);  // reads no more counters
  if constexpr (!Epilogue::kKeep) Whole::template write<true>(Normalise<Out>{}, acc, maps, shared + tile_at, map_out, first, n, thread);
  else Writer::template write<true>(Normalise<Out>{}, acc, maps, staging, map_out, first, n, thread);
  Exchange<Mainloop>::record(column, p.state, n, one);
}

}  // namespace fxfuse::hopper
