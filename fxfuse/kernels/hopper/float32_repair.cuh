// Accumulators that did not come out finite, again in plain float32, so that inf and NaN stand where such a product has them.
//
// The split makes inf - inf of an infinity, and infinity of a number next to FLT_MAX: whatever should be infinite or NaN is
// not finite after the tensor cores, and only that is computed again, by a whole warp each. Meanwhile the accumulators wait
// in the result's memory, so that this costs no registers.
#pragma once

#include <cstdint>

#include "../common.cuh"
#include "barrier.cuh"

namespace fxfuse::hopper {

// The operands as they lie in memory; element (row, k) of A at a[row * a_row + k * a_k], B likewise;
// the result with columns side by side.
struct Float32Operands {
  const float *a, *b;
  int64_t a_row, a_k, b_row, b_k;
  int rows, columns, k;
  float* out;  // where sums may wait
  int64_t out_row;
};

// Volatile, so that the compiler does not gather many of them and run out of registers.
__device__ __forceinline__ float2 load_result(const float* place) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(place) : "memory");
  return x;
}
__device__ __forceinline__ void store_result(float* place, float x, float y) {
  asm volatile("st.global.cg.v2.f32 [%0], {%1, %2};" ::"l"(place), "f"(x), "f"(y) : "memory");
}

// Accumulators of 64 rows of a tile from (m, n) on, each to or from its place in the result (columns even in number).
template <bool PUT, int COUNT>
__device__ __forceinline__ void exchange(const Float32Operands& p, float (&acc)[COUNT], int m, int n, int thread) {
  asm volatile("" : "+r"(m), "+r"(n));  // or every address is kept in registers from the first call to the second
  const int lane = thread % kWarp, row = m + 16 * (thread / kWarp) + lane / 4, column = n + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) {
    const int r = row + i / 2 % 2 * 8, c = column + i / 4 * 8;
    if (r >= p.rows || c >= p.columns) continue;
    float* const place = p.out + r * p.out_row + c;
    if constexpr (PUT) {
      store_result(place, acc[i], acc[i + 1]);
    } else {
      const float2 x = load_result(place);
      acc[i] = x.x, acc[i + 1] = x.y;
    }
  }
}

// Of a warp's 16 rows in the result, what is not finite again.
template <int BN>
__device__ __forceinline__ void float32_again(const Float32Operands& p, int m, int n, int lane) {
  constexpr uint32_t kAll = 0xffffffffu;
  constexpr int kTogether = 4;
  const int rows = min(16, p.rows - m);
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    const float* const a = p.a + (m + r) * p.a_row;
    float* const out = p.out + (m + r) * p.out_row;
#pragma unroll 1
    for (int c = n; c < min(n + BN, p.columns); c += kWarp) {
      const bool bad = c + lane < p.columns && !isfinite(__ldcg(out + c + lane));
#pragma unroll 1
      for (uint32_t left = __ballot_sync(kAll, bad); left != 0;) {
        const float* b[kTogether];
        int column[kTogether];
        float sum[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {  // fewer than that many: the last one several times
          column[j] = c + __ffs(left) - 1;
          b[j] = p.b + column[j] * p.b_row;
          sum[j] = 0.f;
          if ((left & (left - 1)) != 0 || j == kTogether - 1) left &= left - 1;
        }
#pragma unroll 4
        for (int k = lane; k < p.k; k += kWarp) {
          const float x = a[k * p.a_k];
#pragma unroll
          for (int j = 0; j < kTogether; ++j) sum[j] = fmaf(x, b[j][k * p.b_k], sum[j]);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          sum[j] = warp_sum(sum[j]);
          if (lane == 0) __stcg(out + column[j], sum[j]);
        }
      }
    }
  }
}

// acc: 64 rows of a tile from (m, n) on, as wgmma leaves them, BN columns.
template <int BN>
__device__ __forceinline__ void float32_repair(const Float32Operands& p, float (&acc)[BN / 2], int m, int n, int thread) {
  float probe = 0.f;
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) probe = fmaf(0.f, acc[i], probe);
  if (__all_sync(0xffffffffu, probe == 0.f)) return;
  exchange<true>(p, acc, m, n, thread);
  __syncwarp();
  float32_again<BN>(p, m + 16 * (thread / kWarp), n, thread % kWarp);
  __syncwarp();
  exchange<false>(p, acc, m, n, thread);
  fence_async_proxy_global();
}

}  // namespace fxfuse::hopper
