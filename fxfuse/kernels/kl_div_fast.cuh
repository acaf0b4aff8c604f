// The short road of kl_div: a pack of t * (log t - log p) with half the instructions of library logarithms.
//
// It answers only for packs of plain numbers: 0 <= t (not huge), and an input whose logarithm is finite. It says so by
// returning false for every other pack, so whatever it returns is what the long road would have said, up to rounding.
#pragma once

#include "numerics.cuh"

namespace fxfuse {

// log(m) for m in [2/3, 4/3): minimax polynomial in m - 1, error below 1 ulp.
__device__ __forceinline__ float log_mantissa(float m) {
  const float f = m - 1.f;
  const float s = f * f;
  float r = fmaf(-0.130310059f, f, 0.140869141f);
  r = fmaf(r, s, fmaf(-0.121483691f, f, 0.139814854f));
  r = fmaf(r, f, -0.166846052f);
  r = fmaf(r, f, 0.200120345f);
  r = fmaf(r, f, -0.249996200f);
  r = fmaf(r, f, 0.333331972f);
  r = fmaf(r, f, -0.5f);
  return fmaf(r, s, f);
}

// A positive normal float as 2^e * m with m in [2/3, 4/3): e * 2^23 in `scaled_exponent`, m returned. For x = 0 the two
// are finite (and of no meaning), so that 0 * log(0) comes out as 0.
__device__ __forceinline__ float split_mantissa(float x, int& scaled_exponent) {
  const int bits = __float_as_int(x);
  scaled_exponent = (bits - 0x3f2aaaab) & 0xff800000;
  return __int_as_float(bits - scaled_exponent);
}

constexpr float kLn2Scaled = kLn2 / 8388608.f;  // ln 2 / 2^23

// `numerator / p` for a normal p below 2^126, rounded as division rounds but for rare last bits.
__device__ __forceinline__ float divide_normal(float numerator, float p) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(p));
  const float q = numerator * r;
  return fmaf(fmaf(-q, p, numerator), r, q);
}

// log2 on the special function unit; 0 and numbers below 2^-126 give -inf, negative ones NaN.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log t - log p, with x either p or its logarithm.
template <bool LOG_INPUT>
__device__ __forceinline__ float log_ratio(float t, float x) {
  int exponent;
  const float log_t = log_mantissa(split_mantissa(t, exponent));
  if constexpr (!LOG_INPUT) return fmaf(float(exponent), kLn2Scaled, log_t) - x;
  int exponent_x;
  const float log_x = log_mantissa(split_mantissa(x, exponent_x));
  // Equal exponents leave the difference of the mantissas' logarithms untouched.
  return fmaf(float(exponent - exponent_x), kLn2Scaled, log_t - log_x);
}

template <bool LOG_INPUT, bool GRADS>
__device__ __forceinline__ bool kl_div_fast_float(const Pack<float>& x, const Pack<float>& t, float g, float& loss,
                                                  Pack<float>& grad) {
  unsigned most_t = 0, most_x = 0;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    most_t = max(most_t, __float_as_uint(t.at[i]));
    if constexpr (LOG_INPUT) most_x = max(most_x, __float_as_uint(x.at[i]) - 0x00800000u);
    sum = fmaf(t.at[i], log_ratio<LOG_INPUT>(t.at[i], x.at[i]), sum);
    if constexpr (GRADS) {
      const float gt = -(g * t.at[i]);
      grad.at[i] = LOG_INPUT ? divide_normal(gt, x.at[i]) : gt;
    }
  }
  loss = sum;
  // t in [0, 2^64); p normal and below 2^126; a finite sum leaves no infinite input.
  return most_t < 0x5f800000u && (LOG_INPUT ? most_x < 0x7e000000u : fabsf(sum) < kInf);
}

// The loss of each of a pack's elements, in place of x. False: not for this road, and nothing is written.
template <bool LOG_INPUT>
__device__ __forceinline__ bool kl_div_fast_elements(Pack<float>& x, const Pack<float>& t) {
  unsigned most_t = 0, most_x = 0;
  Pack<float> loss;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    most_t = max(most_t, __float_as_uint(t.at[i]));
    if constexpr (LOG_INPUT) most_x = max(most_x, __float_as_uint(x.at[i]) - 0x00800000u);
    loss.at[i] = t.at[i] * log_ratio<LOG_INPUT>(t.at[i], x.at[i]);
    sum += fabsf(loss.at[i]);
  }
  if (most_t >= 0x5f800000u || (LOG_INPUT ? most_x >= 0x7e000000u : !(sum < kInf))) return false;
  x = loss;
  return true;
}

// Whether all of a pack's targets are plain: not negative (float16: and not above 1, so that nothing overflows).
__device__ __forceinline__ bool plain_targets(const Pack<__nv_bfloat16>& t) {
  return ((t.raw.x | t.raw.y | t.raw.z | t.raw.w) & 0x80008000u) == 0;
}
__device__ __forceinline__ bool plain_targets(const Pack<__half>& t) {
  const __half2* h = reinterpret_cast<const __half2*>(&t.raw);
  const __half2 most = __hmax2_nan(__hmax2_nan(h[0], h[1]), __hmax2_nan(h[2], h[3]));
  return ((t.raw.x | t.raw.y | t.raw.z | t.raw.w) & 0x80008000u) == 0 && __hble2(most, __float2half2_rn(1.f));
}

template <typename T, bool LOG_INPUT, bool GRADS>
__device__ __forceinline__ bool kl_div_fast_half(const Pack<T>& x, const Pack<T>& t, float g, float& loss,
                                                 Pack<T>& grad) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Pack<T>::N; ++i) {
    const float xv = x.get(i), tv = t.get(i);
    const float log2_t = log2_fast(fmaxf(tv, 1.1754944e-38f));  // 0 * log(0) = 0
    const float d = LOG_INPUT ? log2_t - log2_fast(xv) : fmaf(xv, -kLog2e, log2_t);
    sum = fmaf(tv, d, sum);
    if constexpr (GRADS) {
      const float gt = -(g * tv);
      float r = 1.f;
      if constexpr (LOG_INPUT) asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(xv));
      grad.set(i, gt * r);
    }
  }
  loss = sum * kLn2;
  return plain_targets(t) && fabsf(sum) < kInf;
}

// Sum of a pack's losses in `loss` and, with GRADS, -(g t) or -(g t) / p in `grad`. False: not for this road.
template <typename T, bool LOG_INPUT, bool GRADS>
__device__ __forceinline__ bool kl_div_fast(const Pack<T>& x, const Pack<T>& t, float g, float& loss, Pack<T>& grad) {
  if constexpr (sizeof(T) == 4) return kl_div_fast_float<LOG_INPUT, GRADS>(x, t, g, loss, grad);
  else return kl_div_fast_half<T, LOG_INPUT, GRADS>(x, t, g, loss, grad);
}

}  // namespace fxfuse
