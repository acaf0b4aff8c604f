// A persistent, warp-specialised GEMM: out[M, N] = epilogue(A[M, K] B[N, K]^T).
//
// A block is one producer warpgroup (its first warp drives the copy engine, the others prepare the epilogue's column
// numbers and whatever the mainloop wants prepared) and two consumer warpgroups. Each walks the same list of tiles; barriers
// in shared memory are all they share.
#pragma once

#include "batch.cuh"
#include "behind.cuh"
#include "column_statistics.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "scheduler.cuh"

#include "../pdl.cuh"

namespace fxfuse::hopper {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kColumnThreads = kWarpgroup - kWarp;
constexpr int kProducerBarrier = 5;  // of those
constexpr int kConsumersBarrier = BatchExchange<kWarpgroup, 2>::kBarrier;
constexpr int kMostBatchRows = kPartialRows * BatchExchange<kWarpgroup, 2>::kMostBlocks;
constexpr int kBehindBand = 3;  // columns of tiles, where all of them are normalised behind

template <typename Mainloop, typename Writer, typename Epilogue>
struct SharedLayout {
  static constexpr int kStaging = Mainloop::kSharedBytes;  // after the stages
  static constexpr int kColumns = kStaging + Mainloop::kConsumers * Writer::kSharedBytes;
  static constexpr int kBarriers = kColumns + Mainloop::kBlockN * int(sizeof(float2));  // a column's two numbers
  static constexpr int kColumnsFull = kBarriers + Mainloop::Pipeline::kBarrierBytes;
  static constexpr int kColumnsEmpty = kColumnsFull + 8;
  static constexpr int kThrough = kColumnsEmpty + 8;
  static constexpr int kBehind = kThrough + 8;
  static constexpr int kBytes = kBehind + int(sizeof(BehindState));
  static_assert(kBytes <= 227 * 1024, "more shared memory than a block can have");
};

// Numbers that every block needs, by value in constant memory.
template <typename Mainloop, typename Epilogue>
struct Problem {
  TileOrder order;
  int rows;      // M
  int columns;   // N
  int k_blocks;  // of Mainloop::kBlockK
  int behind;    // the statistics of tiles under this one are merged behind the tensor cores (behind.cuh)
  const void* acc;  // where those are read, and where they go
  void* out;
  typename Epilogue::Params epilogue;
  typename Mainloop::Params mainloop;
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

// The rest of a block's last tile, or with a mainloop that prepares of any tile, whose epilogue needs the statistics of the
// whole batch: from its accumulators, by batch.cuh. EXCHANGED: the tile's columns are in this round, and each block merges
// their statistics; else the warps behind the tensor cores do. `ready` is called once the statistics are there.
template <bool EXCHANGED, typename Mainloop, typename Epilogue, typename Writer, typename Ready>
__device__ __forceinline__ void finish_batch(uint32_t shared, uint8_t* storage,
                                             float (&acc)[Mainloop::kHalves][Mainloop::kAccumulators],
                                             const Problem<Mainloop, Epilogue>& problem, const CUtensorMap* map_out,
                                             const CUtensorMap* map_kept, const Tile& tile, int m, int n, int consumer,
                                             int thread, const Ready& ready) {
  using Layout = SharedLayout<Mainloop, Writer, Epilogue>;
  using Exchange = BatchExchange<Mainloop::kBlockN, Mainloop::kConsumers>;
  const auto& p = problem.epilogue;
  const uint32_t staging = shared + Layout::kStaging + consumer * Writer::kSharedBytes;
  float2* const maps = reinterpret_cast<float2*>(storage + Layout::kColumns);
  const int blocks = problem.order.rows * Mainloop::kCluster, one = consumer * kWarpgroup + thread;
  const auto write = [&](auto columns, const auto& apply, const CUtensorMap* map) {
#pragma unroll
    for (int half = 0; half < Mainloop::kHalves; ++half)
      Writer::template write<decltype(columns)::value>(apply, acc[half], maps, staging, map,
                                                       m + Mainloop::row(consumer, half), n, thread);
  };
  if constexpr (Epilogue::kKeep) write(std::false_type{}, Identity::Apply{}, map_kept);
  const auto normalise = [](float x, float2 c) { return fmaf(x, c.x, c.y); };
  if constexpr (EXCHANGED) {
    const bool records = Exchange::records(p.state, n, m / Mainloop::kBlockM, blocks, one);
    const auto column = Exchange::finish(p.state, p.partials, p.counters.arrived(tile.n), blocks * Mainloop::kConsumers, maps,
                                         problem.rows, n, records, one);
    ready();
    write(std::true_type{}, normalise, map_out);
    if (records) p.state.record(n + one, column.known, column.before, column.moments);
    if constexpr (Mainloop::kPrepares) named_barrier<Exchange::kThreads>(Exchange::kBarrier);  // the maps are free
  } else {
    Exchange::fetch(p.counters.merged(tile.n), blocks, p.maps, maps, problem.columns, n, one);
    write(std::true_type{}, normalise, map_out);
  }
}

template <typename Mainloop, typename Epilogue, typename Out, int BUFFERS>
__global__ void __launch_bounds__(kThreads, 1)
gemm_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
            const __grid_constant__ CUtensorMap map_out, const __grid_constant__ CUtensorMap map_kept,
            const __grid_constant__ Problem<Mainloop, Epilogue> problem) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Writer = TileWriter<Out, Mainloop::kBlockN, BUFFERS>;
  using Layout = SharedLayout<Mainloop, Writer, Epilogue>;
  constexpr int kCluster = Mainloop::kCluster, kConsumers = Mainloop::kConsumers;

  extern __shared__ __align__(1024) uint8_t storage[];
  const uint32_t shared = shared_address(storage);
  float2* const columns = reinterpret_cast<float2*>(storage + Layout::kColumns);
  const uint32_t columns_full = shared + Layout::kColumnsFull, columns_empty = shared + Layout::kColumnsEmpty;
  const uint32_t through = shared + Layout::kThrough;  // the consumers' warps that read no more counters
  typename Mainloop::Pipeline ring(shared + Layout::kBarriers);

  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);
  const int thread = threadIdx.x % kWarpgroup;
  const uint32_t rank = kCluster == 1 ? 0 : cluster_rank();
  const int cluster = int(blockIdx.x) / kCluster, clusters = int(gridDim.x) / kCluster;
  const int tiles = int(problem.order.count());
  constexpr bool kBehind = Epilogue::kBatch && !Mainloop::kPrepares;
  using Work = std::conditional_t<kBehind, Behind<Out, kConsumers * kPartialRows, Mainloop::kBlockN, kConsumers>, Nothing>;
  BehindState* const behind = reinterpret_cast<BehindState*>(storage + Layout::kBehind);
  const Out* const written = static_cast<const Out*>(problem.acc);
  Out* const normalised = static_cast<Out*>(problem.out);
  const BehindTiles work{problem.order, min(problem.behind, tiles - clusters), problem.behind, cluster, clusters,
                         int(rank),     kCluster,                              problem.rows,   problem.columns};

  if (threadIdx.x == 0) {
    if constexpr (kBehind) *behind = {};
    tma_prefetch(&map_a);
    tma_prefetch(&map_b);
    tma_prefetch(&map_out);
    ring.initialise();
    mbarrier_init(columns_full, kColumnThreads);
    mbarrier_init(columns_empty, Mainloop::kConsumers * kWarpgroup / kWarp);
    mbarrier_init(through, Mainloop::kConsumers * kWarpgroup / kWarp);
    mbarrier_init_fence();
  }
  if constexpr (kCluster == 1) __syncthreads();
  else cluster_sync();
  pdl_wait();  // all of this was done beside the end of the kernel before
  pdl_release();

  if (warpgroup == 0) {
    registers_lower<kBehind ? kBehindProducerRegisters : Mainloop::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, thread / kWarp, 0);
    if (warp == 0 && thread == 0) {
      for (int t = cluster; t < tiles; t += clusters) {
        const Tile tile = problem.order.at(t);
        Mainloop::produce(ring, shared, &map_a, &map_b, (tile.m * kCluster + int(rank)) * Mainloop::kBlockM,
                          tile.n * Mainloop::kBlockN, problem.k_blocks, rank);
      }
    } else if ((Epilogue::kColumns || Epilogue::kBatch || Mainloop::kPrepares) && warp > 0) {
      uint32_t parity = 1;  // the column numbers' memory starts free
      for (int t = cluster; t < tiles; t += clusters) {
        if constexpr (Mainloop::kPrepares) Mainloop::prepare(ring, shared, problem.k_blocks, thread - kWarp);
        if constexpr (Epilogue::kColumns) {
          const int n = problem.order.at(t).n * Mainloop::kBlockN;
          mbarrier_wait(columns_empty, parity);
#pragma unroll
          for (int i = thread - kWarp; i < Mainloop::kBlockN; i += kColumnThreads)
            if (n + i < problem.columns) columns[i] = Epilogue::column(problem.epilogue, n + i);
          mbarrier_arrive(columns_full);
          parity ^= 1;
        }
      }
      if constexpr (kBehind) Work::template run<300, 4, 4>(work, problem.epilogue, written, normalised, behind, thread % kWarp);
      if constexpr (Epilogue::kBatch) {
        named_barrier<kColumnThreads>(kProducerBarrier);
        if (warp == 1) {
          mbarrier_wait(through, 0);
          problem.epilogue.counters.leave(problem.order.columns, thread % kWarp);
        }
      }
    }
  } else {
    registers_raise<kBehind ? kBehindConsumerRegisters : Mainloop::kConsumerRegisters>();
    const int consumer = warpgroup - 1;
    const uint32_t staging = shared + Layout::kStaging + consumer * Writer::kSharedBytes;
    uint32_t parity = 0;
    bool sent = false;              // a tile to be normalised behind is on its way to memory
    bool waits = Epilogue::kBatch;  // for counters
    const auto arrived = [&] {
      if constexpr (kBehind) {
        // The ring keeps the warpgroups together, but not where it holds a whole product: nobody counts the next tile
        // before all have counted this one.
        if (problem.k_blocks <= Mainloop::kStages) named_barrier<kConsumers * kWarpgroup>(kConsumersBarrier);
        if (!sent || thread % kWarp != 0) return;
        tma_store_wait_all();
        Work::stored(behind);
      }
    };
    for (int t = cluster; t < tiles; t += clusters) {
      const Tile tile = problem.order.at(t);
      const int m = (tile.m * kCluster + int(rank)) * Mainloop::kBlockM;
      const int n = tile.n * Mainloop::kBlockN;
      float acc[Mainloop::kHalves][Mainloop::kAccumulators];
      const bool left = kBehind && t < work.end;  // to the warps behind the tensor cores
      if constexpr (kBehind)
        Mainloop::consume(problem.mainloop, ring, shared, acc, m, n, problem.k_blocks, consumer, thread, t == cluster, arrived);
      else
        Mainloop::consume(problem.mainloop, ring, shared, acc, m, n, problem.k_blocks, consumer, thread, t == cluster, Nothing{});
      Mainloop::repair(problem.mainloop, acc, m, n, consumer, thread);
      if constexpr (Epilogue::kBatch) {  // under the statistics: it has long left L2, or was never there
        const int column = n + consumer * kWarpgroup + thread;
        if (t >= problem.behind && column < min(problem.columns, n + Mainloop::kBlockN)) problem.epilogue.state.prefetch(column);
      }
      if constexpr (Epilogue::kStatistics)
        if (!left) {
#pragma unroll
          for (int half = 0; half < Mainloop::kHalves; ++half)
            statistics<Mainloop, Epilogue, Writer>(storage, acc[half], problem, m + Mainloop::row(consumer, half), n, consumer,
                                                   thread);
        }
      if constexpr (Epilogue::kBatch) {
        if (thread == 0 && !left) arrive_release(problem.epilogue.counters.arrived(tile.n));
        sent = left;
        if (left) {
          Writer::template write<false>(Identity::Apply{}, acc[0], nullptr, staging, Epilogue::kKeep ? &map_kept : &map_out,
                                        m + Mainloop::row(consumer, 0), n, thread);
        } else if (t < problem.behind) {
          if constexpr (kBehind)
            finish_batch<false, Mainloop, Epilogue, Writer>(shared, storage, acc, problem, &map_out, &map_kept, tile, m, n,
                                                            consumer, thread, Nothing{});
        } else {
          finish_batch<true, Mainloop, Epilogue, Writer>(shared, storage, acc, problem, &map_out, &map_kept, tile, m, n,
                                                         consumer, thread, [&] {
            if (t + clusters < tiles || thread % kWarp != 0) return;
            if constexpr (kBehind)
              if (!Work::over(work, behind)) return;
            mbarrier_arrive(through);
            waits = false;
          });
        }
      } else {
        if constexpr (Epilogue::kColumns) mbarrier_wait(columns_full, parity);
        Epilogue::with(problem.epilogue, [&](const auto& apply) {
#pragma unroll
          for (int half = 0; half < Mainloop::kHalves; ++half)
            Writer::template write<Epilogue::kColumns>(apply, acc[half], columns, staging, &map_out,
                                                       m + Mainloop::row(consumer, half), n, thread);
        });
        if (Epilogue::kColumns && thread % kWarp == 0) mbarrier_arrive(columns_empty);  // the writer's last step was the warp's
        parity ^= 1;
      }
    }
    if (thread % kWarp == 0) tma_store_wait_read<0>();  // the end of the kernel waits for the rest
    if constexpr (kBehind) {
      arrived();
      if (!__all_sync(0xffffffffu, Work::over(work, behind)))  // a warp works as a whole
        Work::template run<50, 8, 8>(work, problem.epilogue, written, normalised, behind, thread % kWarp);
    }
    if (Epilogue::kBatch && thread % kWarp == 0 && waits) mbarrier_arrive(through);
  }
  // A block's shared memory must outlive its neighbours' multicasts and arrivals.
  if constexpr (kCluster > 1) cluster_sync();
#endif
}

template <typename Mainloop, typename Epilogue, typename Out, int BUFFERS>
cudaError_t launch_gemm(const Operands& p, const typename Epilogue::Params& epilogue, int band, int device, int sm_count,
                        cudaStream_t stream) {
  using Writer = TileWriter<Out, Mainloop::kBlockN, BUFFERS>;
  using Layout = SharedLayout<Mainloop, Writer, Epilogue>;
  constexpr int kCluster = Mainloop::kCluster;
  auto* const kernel = gemm_kernel<Mainloop, Epilogue, Out, BUFFERS>;

  static bool prepared[kMaxDevices];
  if (!prepared[device]) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kBytes);
    if (error != cudaSuccess) return error;
    prepared[device] = true;
  }

  CUtensorMap map_a, map_b, map_out, map_kept;
  cudaError_t error = Mainloop::tensor_maps(&map_a, &map_b, p);
  if (error == cudaSuccess)
    error = make_tensor_map(&map_out, TensorMapType<Out>::kType, sizeof(Out), p.out, p.m, p.n, p.pitch_out, Writer::kRows);
  map_kept = map_out;
  if (error == cudaSuccess && p.kept != nullptr)
    error = make_tensor_map(&map_kept, TensorMapType<Out>::kType, sizeof(Out), p.kept, p.m, p.n, p.pitch_out, Writer::kRows);
  if (error != cudaSuccess) return error;

  Problem<Mainloop, Epilogue> problem;
  problem.order.rows = int(ceil_div<int64_t>(p.m, Mainloop::kBlockM * kCluster));
  problem.order.columns = int(ceil_div<int64_t>(p.n, Mainloop::kBlockN));
  problem.order.band = band;
  problem.rows = int(p.m);
  problem.columns = int(p.n);
  problem.k_blocks = int(ceil_div<int64_t>(p.k, Mainloop::kBlockK));
  problem.epilogue = epilogue;
  problem.behind = 0;
  problem.acc = p.kept != nullptr ? p.kept : p.out;
  problem.out = p.out;
  problem.mainloop = Mainloop::params(p);
  const int64_t tiles = problem.order.count();
  int64_t clusters = sm_count / kCluster;
  if constexpr (Epilogue::kBatch) {
    if (p.m <= kMostBatchRows && problem.order.rows <= clusters) {
      // A round holds whole columns of tiles: the last one is finished from its accumulators.
      problem.order.by_columns(1);
      clusters -= clusters % problem.order.rows;
      if (!Mainloop::kPrepares) problem.behind = int((tiles - 1) / clusters * clusters);
    } else if (Mainloop::kPrepares) {
      return cudaErrorNotSupported;
    } else {
      problem.order.by_columns(kBehindBand);
      problem.behind = int(tiles);
    }
  }

  cudaLaunchAttribute attributes[3];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  attributes[2].id = cudaLaunchAttributeCooperative;
  attributes[2].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(kCluster * (tiles < clusters ? tiles : clusters)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Layout::kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = Epilogue::kBatch ? 3 : 2;
  return cudaLaunchKernelEx(&config, kernel, map_a, map_b, map_out, map_kept, problem);
}

}  // namespace fxfuse::hopper
