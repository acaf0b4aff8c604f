// A row of the distillation loss exactly as eager does it: every intermediate stored in T, inf and NaN where it has
// them.
// For the few rows that the online pass cannot vouch for (-inf or NaN logits, float16 overflow). Slow and plain.
#pragma once

#include "kl_div_point.cuh"

namespace fxfuse {

template <typename T>
__device__ __forceinline__ float stored(float x) { return to_float(from_float<T>(x)); }

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
  float temperature_s, temperature_t;
  float max_s, max_t, sum_s, sum_t;

  template <typename T>
  __device__ float log_p(float s) const { return stored<T>(stored<T>(s / temperature_s) - max_s - logf(sum_s)); }
  template <typename T, bool LOG_TARGET>
  __device__ float target(float t) const {
    const float x = stored<T>(t / temperature_t) - max_t;
    return stored<T>(LOG_TARGET ? x - logf(sum_t) : expf(x) / sum_t);
  }
};

// By a whole block of THREADS. Returns the row's loss to every thread; writes the gradients that are not null.
template <typename T, bool LOG_TARGET, int THREADS>
__device__ __noinline__ double exact_row(const T* s, const T* t, int64_t n, float temperature_s, float temperature_t,
                                         float g, T* grad_s, T* grad_t) {
  __shared__ float shared_max[THREADS / kWarp];
  __shared__ double shared[THREADS / kWarp];
  ExactRow row{temperature_s, temperature_t, -kInf, -kInf, 0, 0};
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    row.max_s = Max{}(row.max_s, stored<T>(ld_one(s + i) / temperature_s));
    row.max_t = Max{}(row.max_t, stored<T>(ld_one(t + i) / temperature_t));
  }
  row.max_s = block_max<THREADS>(row.max_s, shared_max);
  row.max_t = block_max<THREADS>(row.max_t, shared_max);
  double sum_s = 0, sum_t = 0;
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    sum_s += double(expf(stored<T>(ld_one(s + i) / temperature_s) - row.max_s));
    sum_t += double(expf(stored<T>(ld_one(t + i) / temperature_t) - row.max_t));
  }
  row.sum_s = float(block_sum<THREADS>(sum_s, shared));
  row.sum_t = float(block_sum<THREADS>(sum_t, shared));

  double loss = 0, flow_s = 0, flow_t = 0;  // sums that the (log-)softmax derivatives subtract
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    const float q = row.target<T, LOG_TARGET>(ld_one(t + i));
    const Point r = point<T, LOG_TARGET, false>(row.log_p<T>(ld_one(s + i)), q, g);
    loss += double(stored<T>(r.loss));
    flow_s += double(r.grad_input);
    flow_t += double(LOG_TARGET ? r.grad_target : r.grad_target * q);
  }
  loss = block_sum<THREADS>(loss, shared);
  if (grad_s == nullptr && grad_t == nullptr) return loss;
  const float total_s = float(block_sum<THREADS>(flow_s, shared));
  const float total_t = float(block_sum<THREADS>(flow_t, shared));
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    const float log_p = row.log_p<T>(ld_one(s + i)), q = row.target<T, LOG_TARGET>(ld_one(t + i));
    const Point r = point<T, LOG_TARGET, false>(log_p, q, g);
    if (grad_s != nullptr) st_one(grad_s + i, (r.grad_input - expf(log_p) * total_s) / temperature_s);
    if (grad_t != nullptr) {
      const float flow = LOG_TARGET ? r.grad_target - expf(q) * total_t : q * (r.grad_target - total_t);
      st_one(grad_t + i, flow / temperature_t);
    }
  }
  return loss;
}

}  // namespace fxfuse
