// Backward of scale and BatchNorm in training in one launch, for batches that a block can hold.
//
// A block takes 128 bytes of columns and every row: dy stays in registers and acc in shared memory from the one read to the
// one write, and no block waits for another. The sums run while the rows arrive. batchnorm_backward.cuh has the algebra, and
// the passes for batches that do not fit.
//
// Bytes moved: dy and acc once, d acc once.
#pragma once

#include "batchnorm_backward.cuh"
#include "sm90.cuh"

#include <type_traits>

namespace fxfuse {

constexpr int kOnceThreads = 512, kOnceLanes = 8;           // lanes side by side in a row
constexpr int kOnceRows = kOnceThreads / kOnceLanes;        // rows of a step
constexpr int kOncePacks = 16;                              // of dy that a thread holds
constexpr int once_bytes(int held) { return held * kOnceThreads * 16; }  // of shared memory

// The steps in which a block takes so many rows, 4, 8 or 16; 0 where it cannot. wide: packs of dy for one of acc.
inline int once_steps(int64_t rows, int wide) {
  for (int held = 4; held * wide <= kOncePacks; held *= 2)
    if (rows <= int64_t(held) * kOnceRows) return held;
  return 0;
}

template <int FROM, int TO, typename F>
__device__ __forceinline__ void unrolled(const F& f) {
  if constexpr (FROM < TO) {
    f(std::integral_constant<int, FROM>{});
    unrolled<FROM + 1, TO>(f);
  }
}

// Packs of dy beside one of acc: two under autocast, where the result is float32.
template <typename Dy, typename T> constexpr int kOnceWide = int(sizeof(Dy) / sizeof(T));

// d_acc may be acc or dy.
template <typename Dy, typename T, int HELD>
__global__ void __launch_bounds__(kOnceThreads, HELD * kOnceWide<Dy, T> == 4 ? 2 : 1)
backward_once_kernel(const Dy* dy, const T* acc, BackwardState state, T* d_acc) {
  constexpr int N = Pack<T>::N, kWide = kOnceWide<Dy, T>, kColumns = kOnceLanes * N, kWarps = kOnceThreads / kWarp;
  extern __shared__ __align__(16) uint4 held[];  // [HELD][kOnceThreads] packs of acc, each read by the thread it is of
  __shared__ float2 sums[kWarps][kColumns];
  __shared__ __align__(16) float maps[3][kColumns];
  const int lane = threadIdx.x % kOnceLanes, row_lane = threadIdx.x / kOnceLanes, warp = threadIdx.x / kWarp;
  const int64_t base = int64_t(blockIdx.x) * kColumns, column = base + lane * N;
  const int64_t rows = column < state.columns ? state.rows : 0;
  const auto at = [&](int step) { return (int64_t(step) * kOnceRows + row_lane) * state.columns + column; };
  const auto has = [&](int step) { return step * kOnceRows + row_lane < rows; };

  Pack<Dy> g[HELD][kWide];
#pragma unroll
  for (int step = 0; step < HELD; ++step) {
    if (has(step)) {
      async_load16(held + step * kOnceThreads + threadIdx.x, acc + at(step));
#pragma unroll
      for (int i = 0; i < kWide; ++i) g[step][i] = ld_stream(dy + at(step) + i * Pack<Dy>::N);
    }
    async_commit();
  }
  const bool finishes = threadIdx.x < kColumns && base + threadIdx.x < state.columns;
  BackwardState::Known known;
  if (finishes) known = state.known(base + threadIdx.x);
  float mean[N];
#pragma unroll
  for (int i = 0; i < N; ++i) mean[i] = column < state.columns ? state.saved[column + i] : 0.f;

  const auto gradient = [&](int step, int i) { return g[step][i / Pack<Dy>::N].get(i % Pack<Dy>::N); };
  const auto product = [&](int step) { return *reinterpret_cast<const Pack<T>*>(held + step * kOnceThreads + threadIdx.x); };
  float s[N] = {}, p[N] = {};
  unrolled<0, HELD>([&](auto number) {
    constexpr int step = decltype(number)::value;
    async_wait<HELD - 1 - step>();
    if (!has(step)) return;
    const Pack<T> a = product(step);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s[i] += gradient(step, i);
      p[i] = fmaf(gradient(step, i), a.get(i) - mean[i], p[i]);
    }
  });
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int other = kOnceLanes; other < kWarp; other *= 2) {
      s[i] += __shfl_xor_sync(0xffffffffu, s[i], other);
      p[i] += __shfl_xor_sync(0xffffffffu, p[i], other);
    }
    if (threadIdx.x % kWarp < kOnceLanes) sums[warp][lane * N + i] = {s[i], p[i]};
  }
  __syncthreads();
  if (finishes) {
    float2 total = sums[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      total.x += sums[w][threadIdx.x].x;
      total.y += sums[w][threadIdx.x].y;
    }
    const float3 map = state.finish_column(base + threadIdx.x, known, total.x, total.y);
    maps[0][threadIdx.x] = map.x;
    maps[1][threadIdx.x] = map.y;
    maps[2][threadIdx.x] = map.z;
  }
  __syncthreads();
  float slope[N], shift[N], tilt[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    slope[i] = maps[0][lane * N + i];
    shift[i] = maps[1][lane * N + i];
    tilt[i] = maps[2][lane * N + i];
  }
#pragma unroll
  for (int step = 0; step < HELD; ++step) {
    if (!has(step)) continue;
    const Pack<T> a = product(step);
    Pack<T> d;
#pragma unroll
    for (int i = 0; i < N; ++i)
      d.set(i, fmaf(gradient(step, i), slope[i], fmaf(mean[i] - a.get(i), tilt[i], shift[i])));
    st_keep(d_acc + at(step), d);
  }
}

}  // namespace fxfuse
