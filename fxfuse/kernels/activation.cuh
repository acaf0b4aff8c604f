// Activations and their derivatives, in float32. NaN goes through all of them, as in torch.
#pragma once

#include "common.cuh"

namespace fxfuse {

// The same numbers stand in linear_activation_scale.py: ACTIVATION_CODE.
enum Activation : int { kRelu = 0, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh, kLeakyRelu, kHardtanh, kClamp };

// FAST: exponentials of the special function unit (2e-7 relative near 0, growing with |x|), for results that are rounded
// to 16 bits or come from TF32 products.
template <bool FAST>
__device__ __forceinline__ float exponential(float x) { return FAST ? __expf(x) : expf(x); }
template <bool FAST>
__device__ __forceinline__ float quotient(float x, float y) { return FAST ? __fdividef(x, y) : x / y; }

template <int KIND, bool FAST>
struct Activate {
  float alpha, beta;  // leaky_relu: slope, unused; hardtanh, clamp: least, greatest

  __device__ __forceinline__ float value(float x) const {
    if constexpr (KIND == kRelu) return x < 0.f ? 0.f : x;
    else if constexpr (KIND == kLeakyRelu) return x > 0.f ? x : x * alpha;
    else if constexpr (KIND == kHardtanh || KIND == kClamp) return x < alpha ? alpha : (x > beta ? beta : x);
    else if constexpr (KIND == kGelu) return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    else if constexpr (KIND == kGeluTanh) return 0.5f * x * (1.f + tanhf(inner(x)));
    else if constexpr (KIND == kTanh) return tanhf(x);
    else if constexpr (KIND == kSigmoid) return quotient<FAST>(1.f, 1.f + exponential<FAST>(-x));
    else return quotient<FAST>(x, 1.f + exponential<FAST>(-x));
  }

  // d value / d x, at x.
  __device__ __forceinline__ float slope(float x) const {
    if constexpr (KIND == kRelu) return x <= 0.f ? 0.f : 1.f;
    else if constexpr (KIND == kLeakyRelu) return x > 0.f ? 1.f : alpha;
    else if constexpr (KIND == kHardtanh) return x <= alpha || x >= beta ? 0.f : 1.f;
    else if constexpr (KIND == kClamp) return x >= alpha && x <= beta ? 1.f : 0.f;
    else if constexpr (KIND == kGelu) {
      const float density = 0.39894228040143268f * exponential<FAST>(-0.5f * x * x);
      return 0.5f * (1.f + erff(x * 0.70710678118654752f)) + x * density;
    } else if constexpr (KIND == kGeluTanh) {
      const float t = tanhf(inner(x));
      return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * kRoot * (1.f + 3.f * kCubic * x * x);
    } else if constexpr (KIND == kTanh) {
      const float t = tanhf(x);
      return 1.f - t * t;
    } else {
      const float s = quotient<FAST>(1.f, 1.f + exponential<FAST>(-x));
      return KIND == kSigmoid ? s * (1.f - s) : s * (1.f + x * (1.f - s));
    }
  }

  // The same from y = value(x), for the kinds where y tells (kRelu, kLeakyRelu with a slope of at least 0, kSigmoid, kTanh).
  __device__ __forceinline__ float slope_from_value(float y) const {
    if constexpr (KIND == kTanh) return 1.f - y * y;
    else if constexpr (KIND == kSigmoid) return y * (1.f - y);
    else return slope(y);
  }

 private:
  static constexpr float kRoot = 0.79788456080286536f, kCubic = 0.044715f;  // sqrt(2 / pi)
  static __device__ __forceinline__ float inner(float x) { return kRoot * (x + kCubic * x * x * x); }
};

// Calls `body` with Activate<kind, FAST>; false for an unknown kind. `body` is host code on the host, device code there.
#pragma nv_exec_check_disable
template <bool FAST, typename Body>
__host__ __device__ __forceinline__ bool with_activation(int kind, float alpha, float beta, Body&& body) {
  switch (kind) {
    case kRelu: body(Activate<kRelu, FAST>{alpha, beta}); return true;
    case kGelu: body(Activate<kGelu, FAST>{alpha, beta}); return true;
    case kGeluTanh: body(Activate<kGeluTanh, FAST>{alpha, beta}); return true;
    case kSilu: body(Activate<kSilu, FAST>{alpha, beta}); return true;
    case kSigmoid: body(Activate<kSigmoid, FAST>{alpha, beta}); return true;
    case kTanh: body(Activate<kTanh, FAST>{alpha, beta}); return true;
    case kLeakyRelu: body(Activate<kLeakyRelu, FAST>{alpha, beta}); return true;
    case kHardtanh: body(Activate<kHardtanh, FAST>{alpha, beta}); return true;
    case kClamp: body(Activate<kClamp, FAST>{alpha, beta}); return true;
  }
  return false;
}

}  // namespace fxfuse
