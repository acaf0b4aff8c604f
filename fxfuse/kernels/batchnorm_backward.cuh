// Backward passes of scale and BatchNorm in training, on the product acc that the forward pass kept.
//
// With S = sum dy and P = sum dy (acc - mean) of a column: d beta = S, d gamma = s rstd P, and
// d acc = s gamma rstd (dy - S / M - s^2 rstd^2 P / M (acc - mean)). The gradient of s is gamma rstd P (1 - s^2 rstd^2 var)
// = gamma eps rstd^3 P: closed, so nothing cancels; that of the bias is zero.
#pragma once

#include "batchnorm_forward.cuh"

namespace fxfuse {

// partials[block of rows, column] = (S, P). saved: [3, columns], of which the first row is the mean of acc.
template <typename Dy, typename T, int V>
__global__ void __launch_bounds__(kPassThreads)
backward_sums_kernel(const Dy* dy, const T* acc, const float* saved, float2* partials, int64_t rows, int64_t columns,
                     int64_t block_rows) {
  const int lane = threadIdx.x % kWarp, row_lane = threadIdx.x / kWarp;
  const int64_t column = (int64_t(blockIdx.x) * kWarp + lane) * V;
  const int64_t first = blockIdx.y * block_rows, last = min(rows, first + block_rows);
  __shared__ float2 shared[kRowLanes][kWarp * V];
  float mean[V] = {}, s[V] = {}, p[V] = {};
  if (column < columns) {
#pragma unroll
    for (int i = 0; i < V; ++i) mean[i] = saved[column + i];
#pragma unroll 4
    for (int64_t row = first + row_lane; row < last; row += kRowLanes) {
      const int64_t at = row * columns + column;
      float g[V], a[V];
      load_floats<Dy, V>(dy + at, g);
      load_floats<T, V>(acc + at, a);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        s[i] += g[i];
        p[i] = fmaf(g[i], a[i] - mean[i], p[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) shared[row_lane][i * kWarp + lane] = {s[i], p[i]};
  __syncthreads();
  for (int i = row_lane; i < V; i += kRowLanes) {
    if (column >= columns) continue;
    float2 total = shared[0][i * kWarp + lane];
    for (int r = 1; r < kRowLanes; ++r) {
      total.x += shared[r][i * kWarp + lane].x;
      total.y += shared[r][i * kWarp + lane].y;
    }
    partials[int64_t(blockIdx.y) * columns + column + i] = total;
  }
}

struct BackwardState {
  LinearScale linear;
  BatchNormAffine norm;
  const float* saved;  // [3, columns]: mean of acc, rstd, and what rounding left out of the mean
  // null: not wanted. d_bias is zero; d_s by s itself, d_scale by one scale a column.
  ColumnOutput d_gamma, d_beta, d_bias, d_s, d_scale;
  int64_t rows, columns;

  // What a column's sums are combined with; loaded early where latency counts.
  struct Known {
    float s, divisor, gamma, rstd, rest;
  };
  __device__ __forceinline__ Known known(int64_t c) const {
    return {linear.s(c), linear.divisor.at(c, 1.f), norm.gamma.at(c, 1.f), saved[columns + c], saved[2 * columns + c]};
  }
  // Writes the parameters' gradients; d acc = dy * x + y - (acc - mean) * z of the three numbers returned.
  __device__ __forceinline__ float3 finish_column(int64_t c, const Known& k, float sum, float product) const {
    const float s = k.s, rstd = k.rstd, gamma = k.gamma, rest = k.rest, inverse = 1.f / float(rows);
    product = fmaf(-rest, sum, product);
    const float by_s = gamma * norm.eps * rstd * rstd * rstd * product;
    d_gamma.set(c, s * rstd * product);
    d_beta.set(c, sum);
    d_bias.set(c, 0.f);
    d_s.set(c, by_s);
    d_scale.set(c, by_s * linear.multiplier / k.divisor);
    const float slope = s * gamma * rstd, tilt = s * rstd, by_distance = slope * tilt * tilt * product * inverse;
    return {slope, fmaf(rest, by_distance, -slope * sum * inverse), by_distance};
  }
};

// maps: [3, columns].
template <int GROUPS>
__global__ void __launch_bounds__(kWarp* GROUPS)
finish_backward_kernel(const float2* partials, BackwardState state, float* maps, int blocks) {
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t columns = state.columns, column = int64_t(blockIdx.x) * kWarp + lane;
  __shared__ float2 shared[GROUPS][kWarp];
  float2 sum{0.f, 0.f};
  if (column < columns) {
#pragma unroll 4
    for (int b = group; b < blocks; b += GROUPS) {
      const float2 p = partials[b * columns + column];
      sum.x += p.x;
      sum.y += p.y;
    }
  }
  shared[group][lane] = sum;
  for (int half = GROUPS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) {
      shared[group][lane].x += shared[group + half][lane].x;
      shared[group][lane].y += shared[group + half][lane].y;
    }
  }
  if (group != 0 || column >= columns) return;
  const float3 map = state.finish_column(column, state.known(column), shared[0][lane].x, shared[0][lane].y);
  maps[column] = map.x;
  maps[columns + column] = map.y;
  maps[2 * columns + column] = map.z;
}

template <typename Dy, typename T, int V>
__global__ void __launch_bounds__(kPassThreads)
backward_apply_kernel(const Dy* dy, const T* acc, const float* saved, const float* maps, T* d_acc, int64_t rows,
                      int64_t columns, int64_t block_rows) {
  const int64_t column = (int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp) * V;
  if (column >= columns) return;
  const int64_t first = blockIdx.y * block_rows, last = min(rows, first + block_rows);
  float slope[V], shift[V], tilt[V], mean[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    mean[i] = saved[column + i];
    slope[i] = maps[column + i];
    shift[i] = maps[columns + column + i];
    tilt[i] = maps[2 * columns + column + i];
  }
#pragma unroll 2
  for (int64_t row = first + threadIdx.x / kWarp; row < last; row += kRowLanes) {
    const int64_t at = row * columns + column;
    float g[V], a[V];
    load_floats<Dy, V>(dy + at, g);
    load_floats<T, V>(acc + at, a);
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] = fmaf(g[i], slope[i], fmaf(mean[i] - a[i], tilt[i], shift[i]));
    store_slice<T, V>(d_acc + at, g);
  }
}

}  // namespace fxfuse
