// A pack of kl_div: its arguments and the road that any number can take, one element after another.
#pragma once

#include "kl_div_fast.cuh"
#include "kl_div_point.cuh"

namespace fxfuse {

enum class KlDivMode {
  kReduce,         // partial sums
  kReduceGrads,    // partial sums, and gradients for an incoming gradient of 1
  kNone,           // elementwise loss
  kBackward,       // gradients for a given incoming gradient
  kBackwardInput,  // that of the input alone
};

template <KlDivMode MODE>
constexpr bool kWritesGrads =
    MODE == KlDivMode::kReduceGrads || MODE == KlDivMode::kBackward || MODE == KlDivMode::kBackwardInput;

struct KlDivArgs {
  const void* input;
  const void* target;
  const void* grad_output;  // kBackward: n elements, or one where !grad_is_vector
  void* out;                // kNone
  void* grad_input;         // null where not wanted
  void* grad_target;
  double* partial;
  int64_t n;
  float factor;             // what a reduction multiplies by: 1, 1 / n or 1 / batch
  bool grad_is_vector;
  bool aligned;             // every pointer in use is 16-byte aligned
};

// A pack of elements. Returns the sum of their losses; x takes the loss (kNone) or the gradient of the input, t the
// gradient of the target.
template <typename T, bool LOG_TARGET, bool LOG_INPUT, KlDivMode MODE>
__device__ __forceinline__ float pack_of_points(Pack<T>& x, Pack<T>& t, const Pack<T>* vector_g, float constant_g) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Pack<T>::N; ++i) {
    const float g = vector_g != nullptr ? vector_g->get(i) : constant_g;
    const Point r = point<T, LOG_TARGET, LOG_INPUT>(x.get(i), t.get(i), g);
    sum += r.loss;
    if constexpr (MODE == KlDivMode::kNone) x.set(i, r.loss);
    if constexpr (kWritesGrads<MODE>) x.set(i, r.grad_input);
    if constexpr (kWritesGrads<MODE> && MODE != KlDivMode::kBackwardInput) t.set(i, r.grad_target);
  }
  return sum;
}

// The long road beside the fast one: calls, so that the loop around them stays small.
template <typename T, bool LOG_INPUT>
__device__ __noinline__ float long_road(uint4 x_raw, uint4 t_raw) {
  Pack<T> x, t;
  x.raw = x_raw;
  t.raw = t_raw;
  return pack_of_points<T, false, LOG_INPUT, KlDivMode::kReduce>(x, t, nullptr, 1.f);
}
template <typename T, bool LOG_INPUT>
__device__ __noinline__ uint4 long_road_elements(uint4 x_raw, uint4 t_raw) {
  Pack<T> x, t;
  x.raw = x_raw;
  t.raw = t_raw;
  pack_of_points<T, false, LOG_INPUT, KlDivMode::kNone>(x, t, nullptr, 1.f);
  return x.raw;
}
struct PackGrads {
  uint4 input, target;
  float loss;
};
template <typename T, bool LOG_INPUT>
__device__ __noinline__ PackGrads long_road_grads_call(uint4 x_raw, uint4 t_raw, float g) {
  Pack<T> x, t;
  x.raw = x_raw;
  t.raw = t_raw;
  const float loss = pack_of_points<T, false, LOG_INPUT, KlDivMode::kReduceGrads>(x, t, nullptr, g);
  return {x.raw, t.raw, loss};
}
template <typename T, bool LOG_INPUT>
__device__ __forceinline__ float long_road_grads(Pack<T>& x, Pack<T>& t, float g) {
  const PackGrads r = long_road_grads_call<T, LOG_INPUT>(x.raw, t.raw, g);
  x.raw = r.input;
  t.raw = r.target;
  return r.loss;
}

}  // namespace fxfuse
