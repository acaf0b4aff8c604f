// Memory passes of BatchNorm over a row-major matrix of products: statistics, their merge, normalisation.
//
// V is the number of neighbouring columns of a thread: 16 bytes of the input where the matrix allows, else 1.
#pragma once

#include "batchnorm_columns.cuh"

namespace fxfuse {

constexpr int kPassThreads = 256;

// V neighbouring elements of T as read or written at once.
template <typename T, int V>
struct Slice {
  T at[V];
  static __device__ __forceinline__ Slice load(const T* p) {
    Slice s;
    if constexpr (V == 1) {
      s.at[0] = *p;
    } else {
      static_assert(sizeof(T) * V == 16, "a slice is one 16-byte access");
      *reinterpret_cast<uint4*>(s.at) = *reinterpret_cast<const uint4*>(p);
    }
    return s;
  }
  __device__ __forceinline__ float get(int i) const { return to_float(at[i]); }
};
// V neighbouring elements as float, in as many 16-byte accesses as they take.
template <typename T, int V>
__device__ __forceinline__ void load_floats(const T* p, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = ld_one(p);
  } else {
    constexpr int kStep = Pack<T>::N;
#pragma unroll
    for (int i = 0; i < V; i += kStep) {
      const Pack<T> v = ld_keep(p + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) x[i + j] = v.get(j);
    }
  }
}
template <typename T, int V>
__device__ __forceinline__ void store_slice(T* p, const float (&x)[V]) {
  if constexpr (V == 1) {
    st_one(p, x[0]);
  } else {
    constexpr int kStep = Pack<T>::N;
#pragma unroll
    for (int i = 0; i < V; i += kStep) {
      Pack<T> y;
#pragma unroll
      for (int j = 0; j < kStep; ++j) y.set(j, x[i + j]);
      st_keep(p + i, y);
    }
  }
}

// --- statistics: partials[block of rows, column] = (mean, M2) --------------------------------------------------------------

constexpr int kRowLanes = kPassThreads / kWarp;

// Block (x: 32 V columns, y: `block_rows` rows). Sums are taken from each thread's first value, so that nothing cancels
// for columns whose mean dwarfs their spread.
template <typename T, int V>
__global__ void __launch_bounds__(kPassThreads)
column_statistics_kernel(const T* x, float2* partials, int64_t rows, int64_t columns, int64_t block_rows) {
  const int lane = threadIdx.x % kWarp, row_lane = threadIdx.x / kWarp;
  const int64_t column = (int64_t(blockIdx.x) * kWarp + lane) * V;
  const int64_t first = blockIdx.y * block_rows, last = min(rows, first + block_rows);
  __shared__ Moments shared[kRowLanes][kWarp * V];

  float shift[V] = {}, sum[V] = {}, squares[V] = {};
  float count = 0.f;
  if (column < columns) {
    bool fresh = true;
#pragma unroll 4
    for (int64_t row = first + row_lane; row < last; row += kRowLanes) {
      const auto v = Slice<T, V>::load(x + row * columns + column);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (fresh) shift[i] = v.get(i);
        const float d = v.get(i) - shift[i];
        sum[i] += d;
        squares[i] = fmaf(d, d, squares[i]);
      }
      fresh = false;
      count += 1.f;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float mean = count > 0.f ? sum[i] / count : 0.f;
    // max would turn NaN into 0
    const float m2 = squares[i] - sum[i] * mean;
    shared[row_lane][i * kWarp + lane] = {count, shift[i] + mean, m2 < 0.f ? 0.f : m2};
  }
  __syncthreads();
  for (int i = row_lane; i < V; i += kRowLanes) {
    if (column >= columns) continue;
    Moments m = shared[0][i * kWarp + lane];
    for (int r = 1; r < kRowLanes; ++r) m = merge(m, shared[r][i * kWarp + lane]);
    partials[int64_t(blockIdx.y) * columns + column + i] = {m.mean, m.m2};
  }
}

// Merges the partials of each column and finishes it. maps: [3, columns] for TrainColumns.
template <int GROUPS>
__global__ void __launch_bounds__(kWarp* GROUPS)
finish_columns_kernel(const float2* partials, TrainState state, float* maps, int64_t rows, int64_t block_rows) {
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t columns = state.columns, column = int64_t(blockIdx.x) * kWarp + lane;
  const int blocks = int(ceil_div(rows, block_rows));
  __shared__ Moments shared[GROUPS][kWarp];
  Moments m{0.f, 0.f, 0.f};
  if (column < columns) {
#pragma unroll 4
    for (int b = group; b < blocks; b += GROUPS) {
      const float2 p = partials[b * columns + column];
      m = merge(m, {float(min(block_rows, rows - b * block_rows)), p.x, p.y});
    }
  }
  shared[group][lane] = m;
  for (int half = GROUPS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) shared[group][lane] = merge(shared[group][lane], shared[group + half][lane]);
  }
  if (group != 0 || column >= columns) return;
  const ColumnMap map = state.finish_column(column, shared[0][lane]);
  maps[column] = -map.e;
  maps[columns + column] = map.g;
  maps[2 * columns + column] = map.b;
}

// --- normalisation --------------------------------------------------------------------------------------------------------

// Block (x: 32 V columns, y: `block_rows` rows).
template <typename In, typename Out, int V, typename Columns>
__global__ void __launch_bounds__(kPassThreads)
normalise_kernel(const In* x, Out* out, Columns maps, int64_t rows, int64_t columns, int64_t block_rows) {
  __shared__ __align__(16) float shared[4][kWarp * V];
  const int64_t start = int64_t(blockIdx.x) * kWarp * V, column = start + threadIdx.x % kWarp * V;
#pragma unroll 1
  for (int i = threadIdx.x; i < kWarp * V; i += kPassThreads)
    if (start + i < columns) {
      const ColumnMap made = maps.at(start + i);
      shared[0][i] = made.s;
      shared[1][i] = made.e;
      shared[2][i] = made.g;
      shared[3][i] = made.b;
    }
  __syncthreads();
  if (column >= columns) return;
  const int64_t first = blockIdx.y * block_rows, last = min(rows, first + block_rows);
  ColumnMap map[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int at = threadIdx.x % kWarp * V + i;
    map[i] = {shared[0][at], shared[1][at], shared[2][at], shared[3][at]};
  }
#pragma unroll 4
  for (int64_t row = first + threadIdx.x / kWarp; row < last; row += kRowLanes) {
    const auto v = Slice<In, V>::load(x + row * columns + column);
    float y[V];
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = map[i](v.get(i));
    store_slice<Out, V>(out + row * columns + column, y);
  }
}

// --- all of it in one launch, for batches that a block's registers hold -------------------------------------------------------

// A block takes LANES * V columns and all rows (at most THREADS / LANES * ROWS): one read, one write. Mean first, then the
// squares of the distances from it.
template <typename In, typename Out, int V, int LANES, int ROWS>
__global__ void __launch_bounds__(kPassThreads)
train_columns_kernel(const In* x, Out* out, TrainState state, int64_t rows) {
  constexpr int kWarps = kPassThreads / kWarp, kStride = kPassThreads / LANES;
  const int64_t columns = state.columns;
  const int lane = threadIdx.x % LANES, row_lane = threadIdx.x / LANES, warp = threadIdx.x / kWarp;
  const int64_t column = (int64_t(blockIdx.x) * LANES + lane) * V;
  const bool inside = column < columns;
  __shared__ float shared[3][kWarps][LANES * V];  // sums; squares of distances; distances, which rounding leaves
  __shared__ float maps[3][LANES * V];

  Slice<In, V> values[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (inside && row_lane + r * kStride < rows) values[r] = Slice<In, V>::load(x + (row_lane + r * kStride) * columns + column);

  float mean[V] = {};
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    float sum[V] = {}, left[V] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (!inside || row_lane + r * kStride >= rows) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = values[r].get(i) - mean[i];
        sum[i] = pass == 0 ? sum[i] + d : fmaf(d, d, sum[i]);
        left[i] += d;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int step = LANES; step < kWarp; step *= 2) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
        if (pass == 1) left[i] += __shfl_xor_sync(0xffffffffu, left[i], step);
      }
      if (threadIdx.x % kWarp < LANES) {
        shared[pass][warp][lane * V + i] = sum[i];
        if (pass == 1) shared[2][warp][lane * V + i] = left[i];
      }
    }
    __syncthreads();
    if (pass == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += shared[0][w][lane * V + i];
        mean[i] = total / float(rows);
      }
    }
  }
  if (threadIdx.x < LANES * V) {  // one thread finishes one column
    const int64_t c = int64_t(blockIdx.x) * LANES * V + threadIdx.x;
    if (c < columns) {
      Moments m{float(rows), 0.f, 0.f};
      float left = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        m.mean += shared[0][w][threadIdx.x];
        m.m2 += shared[1][w][threadIdx.x];
        left += shared[2][w][threadIdx.x];
      }
      m.mean /= float(rows);
      const float rest = left / float(rows), m2 = m.m2 - left * rest;
      m.m2 = m2 < 0.f ? 0.f : m2;  // max would turn NaN into 0
      const ColumnMap map = state.finish_column(c, m, rest);
      maps[0][threadIdx.x] = map.e;
      maps[1][threadIdx.x] = map.g;
      maps[2][threadIdx.x] = map.b;
    }
  }
  __syncthreads();
  if (!inside) return;
  ColumnMap map[V];
#pragma unroll
  for (int i = 0; i < V; ++i) map[i] = {1.f, maps[0][lane * V + i], maps[1][lane * V + i], maps[2][lane * V + i]};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (row_lane + r * kStride >= rows) continue;
    float y[V];
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = map[i](values[r].get(i));
    store_slice<Out, V>(out + (row_lane + r * kStride) * columns + column, y);
  }
}

}  // namespace fxfuse
