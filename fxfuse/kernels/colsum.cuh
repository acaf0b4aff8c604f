// Column sums of a row-major matrix, optionally with a weight per row: out[k] = scale * sum_i g[i] * a[i, k].
//
// One read of the matrix. A block of 512 threads owns a stripe of LANES * VEC columns and a range of rows; threads sum
// a few rows in float32 as a tree and carry the running sum in float64, so long and cancelling columns lose nothing.
// With one row range the stripe's sum is final; with several, each writes a float64 partial and fold_kernel adds them
// in a fixed order. Rows that are no multiple of 16 bytes long begin off a piece by a number of elements that comes back
// every `phases` rows: a range keeps to rows of one phase, and its pieces to the columns that they hold in all of them.
#pragma once

#include "pdl.cuh"

namespace fxfuse {

// Rows of 16-byte pieces that a thread loads at once. With 65 to 88 registers a thread, one block and one of the next
// kernel's fill a multiprocessor's registers: the next kernel fits beside it, and a launch of one block for each
// multiprocessor is not packed onto half of them. In pairs, of 64 registers at most, blocks fill each other's pauses:
// for matrices so large that the next kernel's beginning does not count.
constexpr int kColsumThreads = 512;
constexpr int kColsumUnroll = 8, kPairUnroll = 4;

// VEC elements of T as one access: 16 bytes, or one element where rows are not 16-byte aligned.
template <typename T, int VEC>
struct Chunk {
  Pack<T> data;
  __device__ __forceinline__ void load(const T* p) { data = ld_stream(p); }
  __device__ __forceinline__ void load_some(const T* p, int count) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) data.at[i] = i < count ? p[i] : from_float<T>(0.f);
  }
  __device__ __forceinline__ void clear() { data.raw = uint4{0, 0, 0, 0}; }
  __device__ __forceinline__ float get(int i) const { return data.get(i); }
};
template <typename T>
struct Chunk<T, 1> {
  T data;
  __device__ __forceinline__ void load(const T* p) { data = __ldg(p); }
  __device__ __forceinline__ void load_some(const T* p, int) { load(p); }
  __device__ __forceinline__ void clear() { data = from_float<T>(0.0f); }
  __device__ __forceinline__ float get(int) const { return to_float(data); }
};

template <typename T>
struct ColsumArgs {
  const T* a;             // [rows, cols], row stride ld
  int64_t ld, rows, cols;
  const T* g;             // [rows] at stride g_stride: the weights; read only by WEIGHTED kernels
  int64_t g_stride;
  int phases;             // 1 unless PHASED
  int rows_per_split;     // of the rows of a phase
  int release_rows;       // rows of a range that are left to read when the next kernel may start (see pdl.cuh)
  unsigned stripes;       // block index = split * stripes + stripe; one block more, where extra_sum is given, adds
  unsigned splits;        // row ranges of all phases: number s is range s / phases of phase s % phases
  const T* extra;         // [extra_count] at extra_stride, whose sum goes to *extra_sum
  int64_t extra_count, extra_stride;
  double* extra_sum;
  double scale;
  float* out;             // [cols], where there is one row range
  double* partial;        // [splits, cols], where there are several
};

// The sum of a vector by one block, into *out.
template <typename T>
__device__ __forceinline__ void vector_sum(const T* p, int64_t count, int64_t stride, double* out, double* shared) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kColsumThreads) sum += double(to_float(p[i * stride]));
  sum = block_sum<kColsumThreads>(sum, shared);
  if (threadIdx.x == 0) *out = sum;
}

template <typename T, int VEC, int LANES, int UNROLL, bool WEIGHTED, bool PHASED>
__global__ void __launch_bounds__(kColsumThreads, UNROLL == kPairUnroll ? 2 : 1) colsum_kernel(ColsumArgs<T> args) {
  constexpr int kRowLanes = kColsumThreads / LANES;  // rows that a block reads at once
  constexpr int kWarps = kColsumThreads / kWarp;
  constexpr int kStripe = LANES * VEC;
  static_assert(LANES <= kWarp, "a warp covers whole rows of the stripe");
  __shared__ double shared[kWarps][kStripe];
  pdl_wait();
  if (blockIdx.x == args.stripes * args.splits) {
    vector_sum(args.extra, args.extra_count, args.extra_stride, args.extra_sum, &shared[0][0]);
    return;
  }
  const unsigned split = blockIdx.x / args.stripes, stripe = blockIdx.x - split * args.stripes;
  const int lane = threadIdx.x % LANES;
  const int phases = PHASED ? args.phases : 1, phase = PHASED ? int(split) % phases : 0;
  // Elements between the piece that a row begins in and the row.
  const int ahead = PHASED ? int((reinterpret_cast<uintptr_t>(args.a + phase * args.ld) & 15) / sizeof(T)) : 0;
  const int64_t column = int64_t(stripe) * kStripe + lane * VEC - ahead;
  const int64_t rows = PHASED ? ceil_div(args.rows - phase, int64_t(phases)) : args.rows;
  const int64_t first = int64_t(split / phases) * args.rows_per_split;
  // Rows from this thread's first one to the end of the range.
  int left = int(min(int64_t(args.rows_per_split), rows - first)) - int(threadIdx.x / LANES);

  double sum[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum[j] = 0;
  if (column < args.cols) {
    const int64_t row = (first + threadIdx.x / LANES) * phases + phase;
    const T* p = args.a + row * args.ld + column;
    const T* pg = WEIGHTED ? args.g + row * args.g_stride : nullptr;
    const int64_t step = phases * kRowLanes * args.ld, g_step = phases * kRowLanes * args.g_stride;
    // Of the matrix' last row, what a piece holds past its end may not be there.
    const T* const last = PHASED && column + VEC > args.cols ? args.a + (args.rows - 1) * args.ld + column : nullptr;
    for (; left > 0; left -= UNROLL * kRowLanes) {
      if (left <= args.release_rows) pdl_release();
      Chunk<T, VEC> x[UNROLL];
      float g[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (u * kRowLanes < left) {
          if (PHASED && p == last) x[u].load_some(p, int(args.cols - column));
          else x[u].load(p);
          if (WEIGHTED) g[u] = to_float(*pg);
        } else {
          x[u].clear();
          if (WEIGHTED) g[u] = 0;
        }
        p += step;
        if (WEIGHTED) pg += g_step;
      }
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        float t[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) t[u] = WEIGHTED ? g[u] * x[u].get(j) : x[u].get(j);
#pragma unroll
        for (int width = UNROLL / 2; width > 0; width /= 2)
#pragma unroll
          for (int u = 0; u < width; ++u) t[u] += t[u + width];
        sum[j] += double(t[0]);
      }
    }
  }
  pdl_release();
  // Lanes of a warp that hold the same columns, then the warps.
#pragma unroll
  for (int j = 0; j < VEC; ++j)
#pragma unroll
    for (int other = LANES; other < kWarp; other *= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], other);
  if (threadIdx.x % kWarp < LANES) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) shared[threadIdx.x / kWarp][lane * VEC + j] = sum[j];
  }
  __syncthreads();
  const int64_t k = int64_t(stripe) * kStripe + threadIdx.x - ahead;
  if (threadIdx.x < kStripe && k >= 0 && k < args.cols) {
    double total[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total[w % 4] += shared[w][threadIdx.x];
    const double all = (total[0] + total[1]) + (total[2] + total[3]);
    if (args.out != nullptr) args.out[k] = float(args.scale * all);
    else args.partial[split * args.cols + k] = all;
  }
}

// out[k] = scale * (sum_s partial[s, k] + the `tail` last rows of the matrix). Blocks of 32 columns x 32 partials.
template <typename T>
__global__ void __launch_bounds__(1024) fold_kernel(const double* partial, int64_t count, int64_t cols, const T* tail,
                                                    int tail_rows, double scale, float* out) {
  __shared__ double shared[kWarp][kWarp + 1];
  pdl_release();  // what the next kernel reads early was written before the kernel that wrote `partial` began
  pdl_wait();
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t k = int64_t(blockIdx.x) * kWarp + lane;
  double sum = 0;
  if (k < cols) {
#pragma unroll 4
    for (int64_t s = group; s < count; s += kWarp) sum += partial[s * cols + k];
    for (int r = group; r < tail_rows; r += kWarp) sum += double(to_float(tail[r * cols + k]));
  }
  shared[group][lane] = sum;
  __syncthreads();
  sum = warp_sum(shared[lane][group]);  // warp `group` adds the partial sums of column `group`
  if (lane == 0 && int64_t(blockIdx.x) * kWarp + group < cols) {
    out[int64_t(blockIdx.x) * kWarp + group] = float(scale * sum);
  }
}

}  // namespace fxfuse
