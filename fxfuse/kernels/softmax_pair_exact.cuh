// A row of the distillation loss by eager's own steps: an intermediate that T stores as 0 or infinite is that, which puts
// inf and NaN where eager has them; the rounding of storing the others is spared.
// For the few rows that the online pass cannot vouch for (-inf or NaN logits, float16 overflow). Slow and plain.
#pragma once

#include "kl_div_point.cuh"

namespace fxfuse {

// Largest over a block, NaN where there is one.
template <int THREADS>
__device__ float block_max(float x, float* shared) {
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
  for (int w = 1; w < THREADS / kWarp; ++w) x = Max{}(x, shared[w]);
  __syncthreads();
  return x;
}

struct ExactRow {
  float inverse_s, inverse_t;  // eager divides by a number so: it multiplies by its inverse
  float max_s, max_t, sum_s, sum_t;

  template <typename T>
  __device__ float scaled_s(float s) const { return range_as<T>(s * inverse_s); }
  template <typename T>
  __device__ float scaled_t(float t) const { return range_as<T>(t * inverse_t); }
  template <typename T>
  __device__ float log_p(float s) const { return range_as<T>(scaled_s<T>(s) - max_s - logf(sum_s)); }
  template <typename T, bool LOG_TARGET>
  __device__ float target(float t) const {
    const float x = scaled_t<T>(t) - max_t;
    return range_as<T>(LOG_TARGET ? x - logf(sum_t) : expf(x) / sum_t);
  }
};

// One element of kl_div with every step in T's range, as it is where a tensor holds each.
template <typename T, bool LOG_TARGET>
__device__ __forceinline__ Point ranged_point(float log_p, float q, float g) {
  Point r;
  if constexpr (LOG_TARGET) {
    const float e = range_as<T>(expf(q)), d = range_as<T>(q - log_p), ge = range_as<T>(__fmul_rn(g, e));
    r.loss = range_as<T>(__fmul_rn(e, d));
    r.grad_input = -ge;
    r.grad_target = range_as<T>(range_as<T>(__fmul_rn(range_as<T>(__fmul_rn(g, d)), e)) + ge);
  } else {
    r = point<T, false, false>(log_p, q, g);
    r.loss = range_as<T>(r.loss);
    r.grad_input = range_as<T>(r.grad_input);
    r.grad_target = range_as<T>(r.grad_target);
  }
  return r;
}

// For a loss that is not reduced: the gradient that reaches each element (null: the same one), and where their losses go
// (null: nowhere), times `scale` both.
template <typename T>
struct ExactElements {
  const T* grad = nullptr;
  T* loss = nullptr;
  float scale = 1;
};

// By a whole block of THREADS. Returns the row's loss to every thread; writes the gradients that are not null.
// g is in T's range.
template <typename T, bool LOG_TARGET, int THREADS>
__device__ __noinline__ double exact_row(const T* s, const T* t, int64_t n, float temperature_s, float temperature_t,
                                         float g, T* grad_s, T* grad_t, ExactElements<T> each = {}) {
  __shared__ float shared_max[THREADS / kWarp];
  __shared__ double shared[THREADS / kWarp];
  ExactRow row{1.f / temperature_s, 1.f / temperature_t, -kInf, -kInf, 0, 0};
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    row.max_s = Max{}(row.max_s, row.scaled_s<T>(ld_one(s + i)));
    row.max_t = Max{}(row.max_t, row.scaled_t<T>(ld_one(t + i)));
  }
  row.max_s = block_max<THREADS>(row.max_s, shared_max);
  row.max_t = block_max<THREADS>(row.max_t, shared_max);
  double sum_s = 0, sum_t = 0;
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    sum_s += double(expf(row.scaled_s<T>(ld_one(s + i)) - row.max_s));
    sum_t += double(expf(row.scaled_t<T>(ld_one(t + i)) - row.max_t));
  }
  row.sum_s = float(block_sum<THREADS>(sum_s, shared));
  row.sum_t = float(block_sum<THREADS>(sum_t, shared));

  const auto g_at = [&](int64_t i) { return each.grad == nullptr ? g : range_as<T>(ld_one(each.grad + i) * each.scale); };
  double loss = 0, flow_s = 0, flow_t = 0;  // sums that the (log-)softmax derivatives subtract
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    const float q = row.target<T, LOG_TARGET>(ld_one(t + i));
    const Point r = ranged_point<T, LOG_TARGET>(row.log_p<T>(ld_one(s + i)), q, g_at(i));
    if (each.loss != nullptr) st_one(each.loss + i, r.loss * each.scale);
    loss += double(r.loss);
    flow_s += double(r.grad_input);
    flow_t += double(LOG_TARGET ? r.grad_target : r.grad_target * q);
  }
  loss = block_sum<THREADS>(loss, shared);
  if (grad_s == nullptr && grad_t == nullptr) return loss;
  const float total_s = float(block_sum<THREADS>(flow_s, shared));
  const float total_t = float(block_sum<THREADS>(flow_t, shared));
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    const float log_p = row.log_p<T>(ld_one(s + i)), q = row.target<T, LOG_TARGET>(ld_one(t + i));
    const Point r = ranged_point<T, LOG_TARGET>(log_p, q, g_at(i));
    if (grad_s != nullptr) st_one(grad_s + i, range_as<T>(r.grad_input - expf(log_p) * total_s) * row.inverse_s);
    if (grad_t != nullptr) {
      const float flow = LOG_TARGET ? r.grad_target - expf(q) * total_t : q * (r.grad_target - total_t);
      st_one(grad_t + i, range_as<T>(flow) * row.inverse_t);
    }
  }
  return loss;
}

}  // namespace fxfuse
