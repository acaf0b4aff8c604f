// kl_div without a sum: the loss of every element, or gradients for an incoming gradient.
//
// A thread takes 16 bytes of each tensor and a block one chunk. Where as much is written as read, that is 8 % faster than
// blocks that stay and go from chunk to chunk: what is read and what is written at a time lie closer together. Bytes: 2
// reads and a write an element, 3 reads and the gradients backward.
#pragma once

#include "kl_div_pack.cuh"

namespace fxfuse {

constexpr int kElementThreads = 256;

template <typename T, bool LOG_TARGET, bool LOG_INPUT, KlDivMode MODE>
__device__ __forceinline__ void elements_of_pack(Pack<T>& x, Pack<T>& t, const Pack<T>* vector_g, float constant_g) {
  if constexpr (MODE == KlDivMode::kNone && !LOG_TARGET && sizeof(T) == 4) {
    if (!kl_div_fast_elements<LOG_INPUT>(x, t)) x.raw = long_road_elements<T, LOG_INPUT>(x.raw, t.raw);
  } else {
    pack_of_points<T, LOG_TARGET, LOG_INPUT, MODE>(x, t, vector_g, constant_g);
  }
}

// ALIGNED: packs may be loaded whole. Else neighbouring threads take neighbouring elements, in the same order of every
// tensor.
template <typename T, bool LOG_TARGET, bool LOG_INPUT, KlDivMode MODE, bool ALIGNED>
__global__ void __launch_bounds__(kElementThreads) kl_div_elements_kernel(KlDivArgs a) {
  constexpr int N = Pack<T>::N;
  const T* const input = static_cast<const T*>(a.input);
  const T* const target = static_cast<const T*>(a.target);
  const T* const grad_output = static_cast<const T*>(a.grad_output);
  T* const out = static_cast<T*>(MODE == KlDivMode::kNone ? a.out : a.grad_input);
  T* const grad_target = MODE == KlDivMode::kBackward ? static_cast<T*>(a.grad_target) : nullptr;
  const bool vector_g = MODE != KlDivMode::kNone && a.grad_is_vector;
  const float constant_g = MODE == KlDivMode::kNone || vector_g ? 1.f : range_as<T>(ld_one(grad_output) * a.factor);

  const int64_t first = int64_t(blockIdx.x) * (kElementThreads * N);
  const auto at = [&](int i) { return first + (ALIGNED ? int(threadIdx.x) * N + i : i * kElementThreads + int(threadIdx.x)); };
  Pack<T> x, t, g;
  if (ALIGNED && at(N) <= a.n) {
    x = ld_keep(input + at(0));
    t = ld_keep(target + at(0));
    if (vector_g) g = ld_keep(grad_output + at(0));
    elements_of_pack<T, LOG_TARGET, LOG_INPUT, MODE>(x, t, vector_g ? &g : nullptr, constant_g);
    if (out != nullptr) st_stream(out + at(0), x);
    if (grad_target != nullptr) st_stream(grad_target + at(0), t);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool inside = at(i) < a.n;
    x.at[i] = inside ? input[at(i)] : from_float<T>(1.f);
    t.at[i] = inside ? target[at(i)] : from_float<T>(1.f);
    if (vector_g && inside) g.at[i] = grad_output[at(i)];
  }
  elements_of_pack<T, LOG_TARGET, LOG_INPUT, MODE>(x, t, vector_g ? &g : nullptr, constant_g);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (at(i) >= a.n) continue;
    if (out != nullptr) out[at(i)] = x.at[i];
    if (grad_target != nullptr) grad_target[at(i)] = t.at[i];
  }
}

}  // namespace fxfuse
