// y[i] = scale * (x[i, :] . v + *beta) for rows at any alignment; and the arguments that rowdot.cuh shares.
#pragma once

#include "pdl.cuh"

namespace fxfuse {

constexpr int kRowdotThreads = 256;

template <typename T>
struct RowdotArgs {
  const T* x;            // [rows, cols], row stride ld
  int64_t ld, rows, cols;
  int phases;            // rows after which the offset of a row's begin from a multiple of 16 bytes comes back
  int64_t chunks;        // 16-byte pieces of a row
  const float* v;        // [cols]
  const double* beta;    // one number, or null
  double scale;
  void* y;               // [rows], of T, or of float where y_float
  bool y_float;
  int lanes_log2;        // 2^lanes_log2 threads share a row
  int panels;            // parts of a row that are taken one after another
  int64_t panel_chunks;  // pieces per part
  int tile_rows;         // 1 to kRowdotTile rows per group of lanes between reductions
  bool v_ready;          // v was there before this kernel could start
};

template <typename T>
__device__ __forceinline__ void store_row(const RowdotArgs<T>& args, int64_t row, double sum) {
  const float y = float(args.scale * sum);
  if (args.y_float) static_cast<float*>(args.y)[row] = y;
  else st_one(static_cast<T*>(args.y) + row, y);
}

// Any alignment: LANES threads per row, ROWS rows at once so that v is read once for them.
template <typename T, int LANES, int ROWS>
__global__ void __launch_bounds__(kRowdotThreads) rowdot_any_kernel(RowdotArgs<T> args, int64_t cols) {
  __shared__ double shared[ROWS][kRowdotThreads / kWarp];
  pdl_wait();
  pdl_release();
  const int lane = threadIdx.x % LANES;
  const double beta = args.beta != nullptr ? *args.beta : 0.0;
  constexpr int kGroups = kRowdotThreads / LANES;
  const int64_t tiles = ceil_div(args.rows, int64_t(ROWS) * kGroups);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = (tile * kGroups + threadIdx.x / LANES) * ROWS;
    const T* p[ROWS];
    float sum[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      p[r] = args.x + min(row + r, args.rows - 1) * args.ld;
#pragma unroll
      for (int u = 0; u < 4; ++u) sum[r][u] = 0;
    }
    int64_t k = lane;
    for (; k + 3 * LANES < cols; k += 4 * LANES) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float v = args.v[k + u * LANES];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r][u] = fmaf(to_float(__ldg(p[r] + k + u * LANES)), v, sum[r][u]);
      }
    }
    for (; k < cols; k += LANES) {
      const float v = args.v[k];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sum[r][0] = fmaf(to_float(__ldg(p[r] + k)), v, sum[r][0]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const double mine = double((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]));
      const double total = warp_sum<(LANES < kWarp ? LANES : kWarp)>(mine);
      if (LANES <= kWarp) {
        if (lane == 0 && row + r < args.rows) store_row(args, row + r, total + beta);
      } else if (threadIdx.x % kWarp == 0) {
        shared[r][threadIdx.x / kWarp] = total;
      }
    }
    if (LANES > kWarp) {
      __syncthreads();
      if (threadIdx.x < ROWS && row + threadIdx.x < args.rows) {
        double total = 0;
        for (int w = 0; w < kRowdotThreads / kWarp; ++w) total += shared[threadIdx.x][w];
        store_row(args, row + threadIdx.x, total + beta);
      }
      __syncthreads();
    }
  }
}

template <typename T, int LANES, int ROWS>
inline cudaError_t launch_rowdot_any(const DeviceProps& props, const RowdotArgs<T>& args, int64_t cols,
                                     cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.rows, int64_t(ROWS * (kRowdotThreads / LANES)));
  const auto grid = unsigned(min(tiles, int64_t(8) * props.sm_count));
  return launch(props, !args.v_ready, rowdot_any_kernel<T, LANES, ROWS>, grid, kRowdotThreads, 0, stream, args, cols);
}

}  // namespace fxfuse
