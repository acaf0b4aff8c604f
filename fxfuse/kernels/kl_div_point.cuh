// One element of kl_div: its loss and its derivatives, inf and NaN as torch's own formulas give them.
#pragma once

#include "numerics.cuh"

#include <type_traits>

namespace fxfuse {

struct Point {
  float loss, grad_input, grad_target;
};

// a / x. Half types with the reciprocal of the special function unit, where that is right to a float's last digits.
template <typename T>
__device__ __forceinline__ float quotient(float a, float x) {
  if constexpr (sizeof(T) == 4) return a / x;
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  const float magnitude = fabsf(x);
  // It takes 0 for a bfloat16 that is no normal float, and gives 0 where the reciprocal is none.
  const bool fits = std::is_same_v<T, __half> || (magnitude >= 1.1754944e-38f && magnitude <= 8.5e37f);
  return fits ? a * r : a / x;
}

// One element. `g` is the gradient that reaches it. What is not used is dropped by the compiler.
template <typename T, bool LOG_TARGET, bool LOG_INPUT>
__device__ __forceinline__ Point point(float x, float t, float g) {
  const float lp = LOG_INPUT ? log_of<T>(x) : x;
  Point r;
  float grad_lp;
  if constexpr (LOG_TARGET) {
    const float e = range_as<T>(exp_of<T>(t));
    const float d = overflow_as<T>(t - lp);
    r.loss = overflow_as<T>(e * d);
    grad_lp = -range_as<T>(g * e);
    r.grad_target = __fmul_rn(__fmul_rn(g, d), e) + __fmul_rn(g, e);
  } else {
    const float lt = log_of<T>(t);
    // __fmul_rn: a product that eager stores may overflow, so it must not be taken into a fused multiply-add.
    const float tlt = t == 0.f ? 0.f : overflow_as<T>(__fmul_rn(t, lt));
    r.loss = overflow_as<T>(tlt - overflow_as<T>(__fmul_rn(t, lp)));
    grad_lp = -range_as<T>(g * t);
    // xlogy's two derivatives: log t (0 where g is), and t / t, which is NaN at 0 and infinity.
    const float ratio = (t == 0.f || isinf(t)) ? __int_as_float(0x7fffffff) : 1.f;
    r.grad_target = (g == 0.f && t == t ? 0.f : __fmul_rn(g, lt)) + __fmul_rn(g, ratio) - __fmul_rn(g, lp);
  }
  r.grad_input = LOG_INPUT ? quotient<T>(grad_lp, x) : grad_lp;
  return r;
}

}  // namespace fxfuse
