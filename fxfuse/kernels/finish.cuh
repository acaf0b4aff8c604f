// Second stage of a deterministic sum: partial sums of the blocks, added in a fixed order by one block.
#pragma once

#include "numerics.cuh"
#include "pdl.cuh"

namespace fxfuse {

constexpr int kMaxPartials = 4096;  // doubles of scratch; the ops allocate this many
constexpr int kFinishThreads = 1024;

// out = scale * (factor * sum). Eager stores the product in the bracket as T, which is where float16 may overflow.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const double* partial, int count, double factor,
                                                                double scale, T* out) {
  __shared__ double shared[kFinishThreads / kWarp];
  double sum = 0;
  pdl_wait();
  for (int i = threadIdx.x; i < count; i += kFinishThreads) sum += partial[i];
  sum = block_sum<kFinishThreads>(sum, shared);
  if (threadIdx.x == 0) {
    const double reduced = sum * factor;
    const float stored = overflow_as<T>(float(reduced));
    *out = from_float<T>(isinf(stored) ? float(stored * scale) : float(reduced * scale));
  }
}

template <typename T>
cudaError_t finish(const DeviceProps& props, const double* partial, int count, double factor, double scale, void* out,
                   cudaStream_t stream) {
  return launch(props, true, finish_kernel<T>, 1, kFinishThreads, 0, stream, partial, count, factor, scale,
                static_cast<T*>(out));
}

}  // namespace fxfuse
