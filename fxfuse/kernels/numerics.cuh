// Elementary functions at the accuracy each dtype needs, and the rounding that decides where eager has inf and NaN.
#pragma once

#include "common.cuh"

namespace fxfuse {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_huge_valf();

// log and exp: the library's for float; the special function unit for half types, whose rounding hides its 2^-22.
template <typename T>
__device__ __forceinline__ float log_of(float x) { return __logf(x); }
template <>
__device__ __forceinline__ float log_of<float>(float x) { return logf(x); }
template <typename T>
__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
template <>
__device__ __forceinline__ float exp_of<float>(float x) { return expf(x); }

// 2^x on the special function unit (relative error 2^-22); results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// An intermediate that eager would have stored as T, kept in float precision except where storing it makes it infinite.
// Only float16 overflows in practice; float and bfloat16 share their exponent.
template <typename T>
__device__ __forceinline__ float overflow_as(float x) { return x; }
template <>
__device__ __forceinline__ float overflow_as<__half>(float x) { return fabsf(x) >= 65520.f ? x * kInf : x; }

// The same, also where storing it makes it zero (which turns a product with infinity into NaN).
template <typename T>
__device__ __forceinline__ float range_as(float x) {
  const float stored = to_float(from_float<T>(x));
  return (stored == 0.f || isinf(stored)) ? stored : x;
}
template <>
__device__ __forceinline__ float range_as<float>(float x) { return x; }

}  // namespace fxfuse
