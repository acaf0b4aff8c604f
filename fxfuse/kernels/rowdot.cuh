// A matrix times a vector, one read of the matrix: y[i] = scale * (x[i, :] . v + *beta).
//
// Threads copy their own 16-byte pieces of x into shared memory asynchronously, several rows ahead, and read back only
// what they copied themselves: the pipeline needs no barrier. Started beside the kernel that computes v (see pdl.cuh),
// it fills the multiprocessor's shared memory with x while that kernel still runs.
//
// Rows that are no multiple of 16 bytes long begin off a piece by a number of elements that comes back every `phases`
// rows: a block keeps to rows of one phase, so that v stays in registers. The elements before a row's first whole piece and
// behind its last are loaded one by one when a tile begins, and added when it ends.
#pragma once

#include "rowdot_any.cuh"

namespace fxfuse {

constexpr int kRowdotTile = 8;  // rows that are reduced together
// From this size on, rows off 16 bytes are read in pieces if v fits the registers: below, single elements are as quick,
// with less to set up.
constexpr int64_t kPhasedBytes = 4 << 20;

// From this size on, reading x is what there is to do, not filling the device beside the kernel that computes v: more blocks
// with fewer rows in flight each keep memory busier.
constexpr int64_t kLongBytes = 128 << 20;

// By the number of 16-byte pieces of a row per thread: rows in flight, and blocks of the grid for each multiprocessor. Together
// they fill its shared memory, and leave room for the kernel that computes v in its registers. LONG: x has kLongBytes.
template <typename T, int CHUNKS, bool LONG = false>
struct RowdotShape {
  static constexpr bool kFull = CHUNKS * Pack<T>::N == 32, kLong = kFull && LONG;
  static constexpr int kStages = CHUNKS == 8 ? (kLong ? 4 : 6) : CHUNKS == 4 ? (kLong ? 5 : kFull ? 8 : 4) : CHUNKS == 2 ? 6 : 8;
  static constexpr int kRing = kStages * CHUNKS * kRowdotThreads * 16;  // bytes of shared memory
  static constexpr int kBlocks = CHUNKS == 1 ? 5 : CHUNKS == 2 ? 4 : kLong ? 2 : kFull ? 1 : 3;
  static constexpr int kRegisterBlocks = CHUNKS == 1 ? 5 : kFull ? 3 : 4;
};

__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  // Zero bytes of source: the piece is filled with zeros and `global` is not read.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Where a thread stands in its sequence of (tile, panel, row).
struct RowdotCursor {
  int64_t tile;
  int panel, row;
  template <typename Args>
  __device__ __forceinline__ void advance(const Args& args, int64_t blocks) {
    if (++row < args.tile_rows) return;
    row = 0;
    if (++panel < args.panels) return;
    panel = 0;
    tile += blocks;
  }
};

// Sums kRowdotTile values per lane over the warp; lane l gets value (l / 4) % 8. Each step halves the values a lane
// still carries, so that eight sums cost little more than one.
__device__ __forceinline__ double reduce_tile(const float (&sum)[kRowdotTile]) {
  static_assert(kRowdotTile == 8, "lane bits 2 to 4 pick the value");
  const int lane = threadIdx.x % kWarp;
  double value[kRowdotTile];
#pragma unroll
  for (int r = 0; r < kRowdotTile; ++r) value[r] = sum[r];
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const double other = __shfl_xor_sync(0xffffffffu, upper ? value[r] : value[r + half], 4 * half);
      value[r] = (upper ? value[r + half] : value[r]) + other;
    }
  }
  return warp_sum<4>(value[0]);
}

// CHUNKS: 16-byte pieces of a panel per thread. PHASED: rows may begin and end anywhere.
template <typename T, int CHUNKS, bool PHASED, bool LONG>
__global__ void __launch_bounds__(kRowdotThreads, RowdotShape<T, CHUNKS>::kRegisterBlocks)
    rowdot_kernel(RowdotArgs<T> args) {
  constexpr int kVec = Pack<T>::N;
  constexpr int kStages = RowdotShape<T, CHUNKS, LONG>::kStages;
  extern __shared__ uint4 ring[];  // [stage][chunk][thread]
  constexpr int kEdge = 2 * kVec, kEdgeSteps = PHASED ? kRowdotTile * (kRowdotThreads / kWarp) * kEdge / kRowdotThreads : 1;
  __shared__ double shared[2][kRowdotTile][kRowdotThreads / kWarp];
  __shared__ float edge_sums[PHASED ? kRowdotTile * (kRowdotThreads / kWarp) : 1];
  const int lanes = 1 << args.lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int group = threadIdx.x >> args.lanes_log2;
  const int groups = kRowdotThreads >> args.lanes_log2;
  // The block among those of its phase, and that phase's rows, of which number r is row r * phases + phase.
  const int phases = PHASED ? args.phases : 1, phase = PHASED ? int(blockIdx.x) % phases : 0;
  const int64_t block = blockIdx.x / phases, blocks = gridDim.x / phases;
  const int64_t rows = PHASED ? ceil_div(args.rows - phase, int64_t(phases)) : args.rows;
  // Elements of a row before its first whole piece; the row's pieces.
  const T* const base = args.x + phase * args.ld;
  const int head = PHASED ? int(-reinterpret_cast<uintptr_t>(base) & 15) / int(sizeof(T)) : 0;
  const int64_t row_chunks = PHASED ? (args.cols - head) / kVec : args.chunks;
  const int64_t tiles = ceil_div(rows, int64_t(args.tile_rows) * groups);
  const auto row_of = [&](int64_t tile, int row) { return (tile * args.tile_rows + row) * groups + group; };
  const auto panel_end = [&](int panel) { return min((panel + 1) * args.panel_chunks, row_chunks); };
  const auto store = [&](int64_t tile, int r, int group_of_row, double sum) {
    const int64_t row = (tile * args.tile_rows + r) * groups + group_of_row;
    if (PHASED) sum += edge_sums[r * groups + group_of_row];
    if (row < rows) store_row(args, row * phases + phase, sum);
  };
  // The single elements of the tile's rows, kEdge threads a row: before its pieces and behind them.
  const auto load_edges = [&](int64_t tile, float (&products)[kEdgeSteps]) {
#pragma unroll
    for (int step = 0; step < kEdgeSteps; ++step) {
      const int number = (step * kRowdotThreads + int(threadIdx.x)) / kEdge, e = threadIdx.x % kEdge;
      const int64_t row = tile * args.tile_rows * groups + number;
      const int64_t k = e < kVec ? e : head + row_chunks * kVec + (e - kVec);
      const bool valid = number < args.tile_rows * groups && row < rows && (e < kVec ? e < head : k < args.cols);
      products[step] = valid ? to_float(__ldg(base + row * phases * args.ld + k)) * args.v[k] : 0.f;
    }
  };

  RowdotCursor next = {block, 0, 0};
  uint4* slot = ring + threadIdx.x;  // the oldest stage, which is read and then filled again
  const auto fill = [&](uint4* to) {
    if (next.tile < tiles) {
      const int64_t row = row_of(next.tile, next.row);
      const int64_t first = next.panel * args.panel_chunks + lane;
      const int64_t end = row < rows ? panel_end(next.panel) : 0;
      const T* from = base + head + row * phases * args.ld + first * kVec;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c, from += lanes * kVec) {
        const bool valid = first + c * lanes < end;
        copy_async16(to + c * kRowdotThreads, valid ? from : base + head, valid);
      }
      next.advance(args, blocks);
    }
    copy_commit();
  };
  float v[CHUNKS][kVec];
  const auto load_v = [&](int panel) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int64_t chunk = panel * args.panel_chunks + c * lanes + lane;
      const bool valid = chunk < panel_end(panel);
      if constexpr (PHASED) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) v[c][i] = valid ? args.v[head + chunk * kVec + i] : 0.f;
      } else {
#pragma unroll
        for (int i = 0; i < kVec; i += 4) {
          const float4 part = valid ? *reinterpret_cast<const float4*>(args.v + chunk * kVec + i) : float4{0, 0, 0, 0};
          v[c][i] = part.x, v[c][i + 1] = part.y, v[c][i + 2] = part.z, v[c][i + 3] = part.w;
        }
      }
    }
  };
  if (args.v_ready) load_v(0);  // ahead of x in the queue
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) fill(ring + s * CHUNKS * kRowdotThreads + threadIdx.x);
  pdl_wait();
  pdl_release();
  if (!args.v_ready) load_v(0);
  const double beta = args.beta != nullptr ? *args.beta : 0.0;
  int parity = 0;
  for (int64_t tile = block; tile < tiles; tile += blocks) {
    float sum[kRowdotTile], edges[kEdgeSteps];
#pragma unroll
    for (int r = 0; r < kRowdotTile; ++r) sum[r] = 0;
    if constexpr (PHASED) load_edges(tile, edges);
    for (int panel = 0; panel < args.panels; ++panel) {
      if (args.panels > 1 && (panel > 0 || tile != block)) load_v(panel);
#pragma unroll
      for (int r = 0; r < kRowdotTile; ++r) {
        if (r < args.tile_rows) {
          copy_wait<kStages - 1>();
          float part[4] = {0, 0, 0, 0};
#pragma unroll
          for (int c = 0; c < CHUNKS; ++c) {
            Pack<T> x;
            x.raw = slot[c * kRowdotThreads];
#pragma unroll
            for (int i = 0; i < kVec; ++i) part[i % 4] = fmaf(x.get(i), v[c][i], part[i % 4]);
          }
          sum[r] += (part[0] + part[1]) + (part[2] + part[3]);
          fill(slot);
          slot += CHUNKS * kRowdotThreads;
          if (slot >= ring + kStages * CHUNKS * kRowdotThreads) slot = ring + threadIdx.x;
        }
      }
    }
    if constexpr (PHASED) {
      __syncthreads();  // the last tile's have been read
#pragma unroll
      for (int step = 0; step < kEdgeSteps; ++step) {
        for (int other = kEdge / 2; other > 0; other /= 2)
          edges[step] += __shfl_xor_sync(0xffffffffu, edges[step], other);
        if (threadIdx.x % kEdge == 0) edge_sums[(step * kRowdotThreads + threadIdx.x) / kEdge] = edges[step];
      }
      __syncthreads();
    }
    if (lanes < kWarp) {
#pragma unroll
      for (int r = 0; r < kRowdotTile; ++r) {
        double total = sum[r];
        for (int other = lanes / 2; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
        if (lane == 0 && r < args.tile_rows) store(tile, r, group, total + beta);
      }
    } else {
      const int r = (threadIdx.x >> 2) & 7;
      const double total = reduce_tile(sum);
      if (lanes == kWarp) {
        if (threadIdx.x % 4 == 0 && r < args.tile_rows) store(tile, r, group, total + beta);
      } else if (threadIdx.x % 4 == 0) {
        shared[parity][r][threadIdx.x / kWarp] = total;
      }
    }
    if (lanes > kWarp) {
      __syncthreads();  // one per tile: the next tile writes the other half of `shared`
      if (int(threadIdx.x) < args.tile_rows * groups) {
        const int r = threadIdx.x / groups, g = threadIdx.x % groups, warps = lanes / kWarp;
        double total = 0;
        for (int w = 0; w < warps; ++w) total += shared[parity][r][g * warps + w];
        store(tile, r, g, total + beta);
      }
      parity ^= 1;
    }
  }
}

template <typename T, int CHUNKS, bool PHASED, bool LONG = false>
inline cudaError_t launch_rowdot_chunks(const DeviceProps& props, const RowdotArgs<T>& args, cudaStream_t stream) {
  using Shape = RowdotShape<T, CHUNKS, LONG>;
  constexpr auto kKernel = rowdot_kernel<T, CHUNKS, PHASED, LONG>;
  const cudaError_t error = prepare_shared_memory<kKernel>(Shape::kRing);
  if (error != cudaSuccess) return error;
  const int64_t blocks = max(int64_t(1), int64_t(Shape::kBlocks) * props.sm_count / args.phases);  // of each phase
  const int64_t rows = ceil_div(args.rows, int64_t(args.phases));
  const int64_t groups = kRowdotThreads >> args.lanes_log2;
  RowdotArgs<T> a = args;
  // Long tiles share a reduction, short ones spread few rows over the machine.
  a.tile_rows = int(max(int64_t(1), min(int64_t(kRowdotTile), ceil_div(rows, groups * blocks))));
  const unsigned grid = unsigned(min(ceil_div(rows, groups * a.tile_rows), blocks) * a.phases);
  return launch(props, !a.v_ready, kKernel, grid, kRowdotThreads, Shape::kRing, stream, a);
}

template <typename T, bool PHASED>
inline cudaError_t launch_rowdot_pieces(const DeviceProps& props, RowdotArgs<T> args, cudaStream_t stream) {
  constexpr int kMost = 32 / Pack<T>::N;  // pieces per thread: 32 values of v stay in registers
  // The largest ring is for Hopper's shared memory.
  const int64_t most = RowdotShape<T, kMost>::kRing <= props.smem_per_block ? kMost : kMost / 2;
  args.panels = int(ceil_div(args.chunks, kRowdotThreads * most));
  args.panel_chunks = ceil_div(args.chunks, int64_t(args.panels));
  args.lanes_log2 = 0;
  while ((1 << args.lanes_log2) < kRowdotThreads &&
         (int64_t(1) << args.lanes_log2) * (args.lanes_log2 < 5 ? 1 : most) < args.panel_chunks) {
    ++args.lanes_log2;
  }
  const int64_t chunks = ceil_div(args.panel_chunks, int64_t(1) << args.lanes_log2);
  if (chunks <= 1) return launch_rowdot_chunks<T, 1, PHASED>(props, args, stream);
  if (chunks <= 2) return launch_rowdot_chunks<T, 2, PHASED>(props, args, stream);
  const bool is_long = chunks > kMost / 2 && args.rows * args.cols * int64_t(sizeof(T)) >= kLongBytes;
  if (is_long) return launch_rowdot_chunks<T, kMost, PHASED, true>(props, args, stream);
  if (chunks <= 4) return launch_rowdot_chunks<T, 4, PHASED>(props, args, stream);
  if constexpr (kMost == 8) return launch_rowdot_chunks<T, 8, PHASED>(props, args, stream);
  return cudaErrorInvalidValue;
}

// args.{cols, phases, chunks, lanes_log2, panels, panel_chunks, tile_rows} are set here. v is 16-byte aligned. Where v is
// not ready, the kernel launched just before on this stream is one of this library that computes it.
template <typename T>
inline cudaError_t launch_rowdot(const DeviceProps& props, RowdotArgs<T> args, int64_t cols, cudaStream_t stream) {
  constexpr int kVec = Pack<T>::N;
  if (args.rows == 0) return cudaSuccess;
  args.cols = cols;
  args.phases = 1;
  if (aligned16(args.x) && args.ld % kVec == 0 && cols % kVec == 0 && cols > 0) {
    args.chunks = cols / kVec;
    return launch_rowdot_pieces<T, false>(props, args, stream);
  }
  // Rows share v where there are enough of them to keep every multiprocessor busy; few rows are spread out.
  const int64_t few = int64_t(2) * props.sm_count;  // blocks
  if (cols <= 128) {
    if (args.rows > 128 * few) return launch_rowdot_any<T, 8, 4>(props, args, cols, stream);
    return launch_rowdot_any<T, 8, 1>(props, args, cols, stream);
  }
  if (cols <= 512) return launch_rowdot_any<T, kWarp, 1>(props, args, cols, stream);
  args.chunks = cols / kVec;  // of the phase with most
  if (args.rows * cols * int64_t(sizeof(T)) >= kPhasedBytes && args.chunks * kVec <= 32 * kRowdotThreads) {
    args.phases = kVec;
    for (int64_t step = args.ld; args.phases > 1 && step % 2 == 0; step /= 2) args.phases /= 2;
    return launch_rowdot_pieces<T, true>(props, args, stream);
  }
  if (cols <= 2048 && args.rows > 32 * few) return launch_rowdot_any<T, kWarp, 4>(props, args, cols, stream);
  if (args.rows > 2 * few) return launch_rowdot_any<T, kRowdotThreads, 2>(props, args, cols, stream);
  return launch_rowdot_any<T, kRowdotThreads, 1>(props, args, cols, stream);
}

}  // namespace fxfuse
