// A persistent, warp-specialised GEMM: out[M, N] = epilogue(A[M, K] B[N, K]^T).
//
// A block is one producer warpgroup (its first warp drives the copy engine, the others prepare the epilogue's column
// numbers and whatever the mainloop wants prepared) and two consumer warpgroups. Each walks the same list of tiles; barriers
// in shared memory are all they share.
#pragma once

#include "behind.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "problem.cuh"
#include "train_tile.cuh"

#include "../pdl.cuh"

namespace fxfuse::hopper {

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
  const uint32_t through = shared + Layout::kThrough, laid = shared + Layout::kLaid;
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
  const int behind_end = min(problem.behind, tiles - clusters);  // a block's last tile stays in its accumulators
  // Read anew where it is needed: numbers kept over a product would be in memory by then.
  const auto behind_tiles = [&] {
    const int block = block_index();
    return BehindTiles{problem.order,    behind_end, problem.behind, block / kCluster, clusters,
                       block % kCluster, kCluster,   problem.rows,   problem.columns};
  };

  if (threadIdx.x == 0) {
    if constexpr (kBehind) *behind = {};
    tma_prefetch(&map_a);
    tma_prefetch(&map_b);
    tma_prefetch(&map_out);
    ring.initialise();
    mbarrier_init(columns_full, kColumnThreads);
    mbarrier_init(columns_empty, Mainloop::kConsumers * kWarpgroup);
    mbarrier_init(through, Mainloop::kConsumers * kWarpgroup / kWarp);
    mbarrier_init(laid, Mainloop::kConsumers * kWarpgroup / kWarp);
    mbarrier_init_fence();
  }
  if constexpr (kCluster == 1) __syncthreads();
  else cluster_sync();
  pdl_wait();  // all of this was done beside the end of the kernel before
  pdl_release();

  if (warpgroup == 0) {
    registers_lower<kBehind ? kBehindProducerRegisters : Mainloop::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, thread / kWarp, 0);
    const int last = cluster + (tiles - 1 - cluster) / clusters * clusters;  // of the block's tiles
    if (warp == 0 && thread == 0) {
      for (int t = cluster; t < tiles; t += clusters) {
        const Tile tile = problem.order.at(t);
        Mainloop::produce(ring, shared, &map_a, &map_b, (tile.m * kCluster + int(rank)) * Mainloop::kBlockM,
                          tile.n * Mainloop::kBlockN, problem.k_blocks, rank);
      }
      if constexpr (kBehind) {
        if constexpr (Epilogue::kKeep) {  // nobody waits for this but the end
          using Whole = TileWriter<Out, Mainloop::kBlockN, Writer::kChunks>;
          const Tile tile = problem.order.at(last);
          mbarrier_wait(laid, 0);
          for (int consumer = 0; consumer < kConsumers; ++consumer)
            Whole::store(shared + LastTile<Mainloop, Whole>::at(ring.stage(), consumer), &map_kept,
                         (tile.m * kCluster + int(rank)) * Mainloop::kBlockM + Mainloop::row(consumer, 0), tile.n * Mainloop::kBlockN);
          tma_store_wait_read<0>();
        }
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
      if constexpr (kBehind) {
        Work::template run<300, 8, 8>(behind_tiles(), problem.epilogue, written, normalised, behind, thread % kWarp);
        named_barrier<kColumnThreads>(kProducerBarrier);
        if (last >= problem.behind) {  // what its statistics will be combined with; all other tiles have left the staging
          auto& prepared = prepared_columns<Mainloop, Epilogue, Writer>(storage);
          for (int i = thread - kWarp; i < Mainloop::kBlockN; i += kColumnThreads)
            Exchange<Mainloop>::prepare(prepared, problem.epilogue.state, problem.order.at(last).n * Mainloop::kBlockN, i);
          mbarrier_arrive(columns_full);
        }
      }
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
    bool sent = false;  // a tile to be normalised behind is on its way to memory
    for (int t = cluster; t < tiles; t += clusters) {
      const Tile tile = problem.order.at(t);
      const int m = (tile.m * kCluster + int(rank)) * Mainloop::kBlockM;
      const int n = tile.n * Mainloop::kBlockN;
      float acc[Mainloop::kHalves][Mainloop::kAccumulators];
      const bool left = kBehind && t < behind_end;  // to the warps behind the tensor cores
      if constexpr (kBehind)
        Mainloop::consume(problem.mainloop, ring, shared, acc, m, n, problem.k_blocks, consumer, thread, t == cluster, [&] {
          // The ring keeps the warpgroups together, but not where it holds a whole product: nobody counts the next tile
          // before all have counted this one.
          if (problem.k_blocks <= Mainloop::kStages) named_barrier<kConsumers * kWarpgroup>(kConsumersBarrier);
          if (!sent || thread % kWarp != 0) return;
          tma_store_wait_all();
          Work::stored(behind);
        });
      else
        Mainloop::consume(problem.mainloop, ring, shared, acc, m, n, problem.k_blocks, consumer, thread, t == cluster, Nothing{});
      Mainloop::repair(problem.mainloop, acc, m, n, consumer, thread);
      const auto measure = [&] {
        if constexpr (Epilogue::kStatistics) {
#pragma unroll
          for (int half = 0; half < Mainloop::kHalves; ++half)
            statistics<Mainloop, Epilogue, Writer>(storage, acc[half], problem, m + Mainloop::row(consumer, half), n, consumer,
                                                   thread);
        }
      };
      if constexpr (kBehind) {
        sent = left;
        if (left) {
          Writer::template write<false>(Identity::Apply{}, acc[0], nullptr, staging, Epilogue::kKeep ? &map_kept : &map_out,
                                        m + Mainloop::row(consumer, 0), n, thread);
        } else {
          finish_last<Out, Mainloop, Epilogue, Writer>(ring, shared, storage, acc[0], problem, &map_out, tile, m, n, consumer,
                                                       thread, t >= problem.behind);
        }
      } else if constexpr (Epilogue::kBatch) {
        auto column = Exchange<Mainloop>::column(problem.epilogue.state, n, m / Mainloop::kBlockM, problem.order.rows * kCluster,
                                                 consumer * kWarpgroup + thread);
        measure();
        if (thread == 0) arrive_release(problem.epilogue.counters.arrived(tile.n));
        finish_batch<Mainloop, Epilogue, Writer>(shared, storage, acc, problem, &map_out, &map_kept, tile, column, m, n, consumer,
                                                 thread);
      } else {
        measure();
        if constexpr (Epilogue::kColumns) mbarrier_wait(columns_full, parity);
        Epilogue::with(problem.epilogue, [&](const auto& apply) {
#pragma unroll
          for (int half = 0; half < Mainloop::kHalves; ++half)
            Writer::template write<Epilogue::kColumns>(apply, acc[half], columns, staging, &map_out,
                                                       m + Mainloop::row(consumer, half), n, thread);
        });
        if (Epilogue::kColumns) mbarrier_arrive(columns_empty);
        parity ^= 1;
      }
    }
    if (thread % kWarp == 0) tma_store_wait_read<0>();  // the end of the kernel waits for the rest
    if constexpr (kBehind) Work::template help<50, 8>(behind_tiles(), problem.epilogue.maps, written, normalised, behind, thread % kWarp);
    else if (Epilogue::kBatch && thread % kWarp == 0) mbarrier_arrive(through);
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
  const int rows = int(ceil_div<int64_t>(p.m, Mainloop::kBlockM * kCluster)), columns = int(ceil_div<int64_t>(p.n, Mainloop::kBlockN));
  problem.order = TileOrder::by_rows(rows, columns, band);
  problem.rows = int(p.m);
  problem.columns = int(p.n);
  problem.k_blocks = int(ceil_div<int64_t>(p.k, Mainloop::kBlockK));
  problem.epilogue = epilogue;
  problem.behind = 0;
  problem.acc = p.kept != nullptr ? p.kept : p.out;
  problem.out = p.out;
  problem.mainloop = Mainloop::params(p);
  const int64_t tiles = problem.order.count();
  if (Epilogue::kBatch && p.m > kMostTrainRows) return cudaErrorNotSupported;
  int64_t clusters = sm_count / kCluster;
  if constexpr (Epilogue::kBatch) {
    if (p.m <= kMostBatchRows && rows <= clusters) {
      // A round holds whole columns of tiles: the last one is finished from its accumulators.
      problem.order = TileOrder::by_columns(rows, columns, 1);
      clusters -= clusters % rows;
      if (!Mainloop::kPrepares) problem.behind = int((tiles - 1) / clusters * clusters);
    } else if (Mainloop::kPrepares) {
      return cudaErrorNotSupported;
    } else {
      // About a round of tiles in the last column: then a block's tile before the last one is of columns complete before the
      // end. It reads all of A once more, which costs more than it brings where a round is shorter.
      const bool round = 4 * rows >= 3 * clusters && rows <= clusters && problem.k_blocks >= kLongProduct;
      problem.order = TileOrder::by_columns(rows, columns, kBehindBand, round);
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
