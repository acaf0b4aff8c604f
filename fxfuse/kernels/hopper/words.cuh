// Numbers in registers of 32 bits. Taken apart and put together one 16-bit number at a time, as from an array of them, they
// take the compiler three times the instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fxfuse::hopper {

template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <> __device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <> __device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// The values of T in one register.
template <typename T> struct WordOf;
template <> struct WordOf<float> {
  static constexpr int kValues = 1;
  static __device__ __forceinline__ void get(uint32_t word, float (&x)[1]) { x[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t put(const float (&x)[1]) { return __float_as_uint(x[0]); }
};
template <> struct WordOf<__nv_bfloat16> {
  static constexpr int kValues = 2;
  static __device__ __forceinline__ void get(uint32_t word, float (&x)[2]) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t put(const float (&x)[2]) { return pack_pair<__nv_bfloat16>(x[0], x[1]); }
};
template <> struct WordOf<__half> {
  static constexpr int kValues = 2;
  static __device__ __forceinline__ void get(uint32_t word, float (&x)[2]) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    x[0] = both.x;
    x[1] = both.y;
  }
  static __device__ __forceinline__ uint32_t put(const float (&x)[2]) { return pack_pair<__half>(x[0], x[1]); }
};

// x as T has it.
template <typename T> __device__ __forceinline__ float rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ float rounded<__half>(float x) { return __half2float(__float2half_rn(x)); }
template <> __device__ __forceinline__ float rounded<__nv_bfloat16>(float x) {
  uint32_t high;  // with nothing below it, x again
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(x), "f"(0.f));
  return __uint_as_float(high);
}

}  // namespace fxfuse::hopper
