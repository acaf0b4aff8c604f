// The pass behind an activation's gradient that leaves the bias' gradient, too: dz = op(dy, saved) and its column sums.
//
// A block takes a stripe of columns, 16 bytes a lane, over some rows; its warps share the rows. Sums are taken of dz before
// it is rounded, in float, and joined over the block's warps; where a stripe has several blocks, the last of them to end
// adds the blocks' sums in their order, so the bits do not depend on which it is. Bytes: dy, saved and dz once.
#pragma once

#include "common.cuh"

namespace fxfuse {

constexpr int kColumnsThreads = 256;
constexpr int kColumnsWarps = kColumnsThreads / kWarp;
constexpr int kMostColumnBlocks = 256;  // of a stripe
constexpr int kLeastColumnRows = 64;    // of a block

template <typename T> constexpr int kStripe = kWarp * Pack<T>::N;  // columns

// Blocks of a stripe: as many as fill the device, while a block has rows enough.
template <typename T>
int column_blocks(int64_t rows, int64_t columns, const DeviceProps& props) {
  const int64_t stripes = ceil_div<int64_t>(columns, kStripe<T>), fill = ceil_div<int64_t>(props.sm_count * 8, stripes);
  const int64_t worth = ceil_div<int64_t>(rows, kLeastColumnRows), most = fill < worth ? fill : worth;
  return int(most < kMostColumnBlocks ? most : kMostColumnBlocks);
}

// partial: [blocks, columns]; arrived: an int a stripe, zero and left so. Neither is used where a stripe has one block.
template <typename T, typename Op>
__global__ void __launch_bounds__(kColumnsThreads)
map2_columns_kernel(const T* a, const T* b, T* out, T* sums_out, float* partial, int* arrived, int64_t rows, int64_t columns,
                    int rows_per_block, Op op) {
  constexpr int N = Pack<T>::N, kUnroll = 4;
  __shared__ float sums[kColumnsWarps][kStripe<T>];
  __shared__ bool last;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t base = int64_t(blockIdx.x) * kStripe<T>, column = base + lane * N;
  const int64_t first = int64_t(blockIdx.y) * rows_per_block;
  const int64_t end = first + rows_per_block < rows ? first + rows_per_block : rows;
  float sum[N] = {};
  const auto take = [&](const Pack<T>& x, const Pack<T>& z, int64_t at) {
    Pack<T> y;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = op(x.get(i), z.get(i));
      sum[i] += value;
      y.set(i, value);
    }
    st_keep(out + at, y);
  };
  if (column < columns) {
    int64_t r = first + warp;
    for (; r + (kUnroll - 1) * kColumnsWarps < end; r += kUnroll * kColumnsWarps) {
      Pack<T> x[kUnroll], z[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        x[u] = ld_keep(a + (r + u * kColumnsWarps) * columns + column);
        z[u] = ld_keep(b + (r + u * kColumnsWarps) * columns + column);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) take(x[u], z[u], (r + u * kColumnsWarps) * columns + column);
    }
    for (; r < end; r += kColumnsWarps) take(ld_keep(a + r * columns + column), ld_keep(b + r * columns + column), r * columns + column);
  }
  const auto join = [&] {  // the warps' sums; thread t < kStripe gets column t's
#pragma unroll
    for (int i = 0; i < N; ++i) sums[warp][lane * N + i] = sum[i];
    __syncthreads();
    float total = 0;
    if (threadIdx.x < kStripe<T>) {
#pragma unroll
      for (int w = 0; w < kColumnsWarps; ++w) total += sums[w][threadIdx.x];
    }
    return total;
  };
  const bool mine = threadIdx.x < kStripe<T> && base + threadIdx.x < columns;
  float total = join();
  if (gridDim.y > 1) {
    if (mine) partial[int64_t(blockIdx.y) * columns + base + threadIdx.x] = total;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived + blockIdx.x, 1) == int(gridDim.y) - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) arrived[blockIdx.x] = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = 0;
    if (column < columns)
      for (int block = warp; block < int(gridDim.y); block += kColumnsWarps)
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += __ldcg(partial + int64_t(block) * columns + column + i);
    total = join();
  }
  if (mine) st_one(sums_out + base + threadIdx.x, total);
}

}  // namespace fxfuse
