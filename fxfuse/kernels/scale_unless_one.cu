// Multiplies gradients that were written by a forward pass by the gradient that came in, unless that is 1.
//
// The incoming gradient is read on the device, so the host never waits for it; where it is 1, as after loss.backward(),
// every block returns at once and the launch is all it costs.
#include "numerics.cuh"

namespace {

using namespace fxfuse;

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

template <typename T>
__device__ void scale(T* p, int64_t n, float g, bool aligned) {
  constexpr int N = Pack<T>::N;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  int64_t done = 0;
  if (aligned) {
    const int64_t packs = n / N;
    int64_t i = thread;
    for (; i + (kUnroll - 1) * threads < packs; i += kUnroll * threads) {
      Pack<T> v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) v[u] = ld_keep(p + (i + u * threads) * N);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int j = 0; j < N; ++j) v[u].set(j, v[u].get(j) * g);
        st_stream(p + (i + u * threads) * N, v[u]);
      }
    }
    for (; i < packs; i += threads) {
      Pack<T> v = ld_keep(p + i * N);
#pragma unroll
      for (int j = 0; j < N; ++j) v.set(j, v.get(j) * g);
      st_stream(p + i * N, v);
    }
    done = packs * N;
  }
  for (int64_t i = done + thread; i < n; i += threads) st_one(p + i, ld_one(p + i) * g);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const T* grad_output, T* a, int64_t na, bool a_aligned, T* b,
                                                         int64_t nb, bool b_aligned) {
  const float g = ld_one(grad_output);
  if (g == 1.f) return;
  if (a != nullptr) scale(a, na, g, a_aligned);
  if (b != nullptr) scale(b, nb, g, b_aligned);
}

}  // namespace

// a[0..na) *= g and b[0..nb) *= g in place, where g = grad_output[0] and all are of one dtype. a and b may be null.
FXFUSE_API int fxfuse_scale_unless_one(const void* grad_output, void* a, int64_t na, void* b, int64_t nb, int dtype,
                                       int device, void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  FXFUSE_DISPATCH(dtype, scalar_t, {
    const int64_t most = na > nb ? na : nb;
    const int64_t useful = ceil_div<int64_t>(most, int64_t(kThreads) * Pack<scalar_t>::N);
    if (useful == 0) return 0;
    const int64_t cap = int64_t(props->sm_count) * 4;
    scale_kernel<scalar_t><<<int(useful < cap ? useful : cap), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const scalar_t*>(grad_output), static_cast<scalar_t*>(a), na, aligned16(a),
        static_cast<scalar_t*>(b), nb, aligned16(b));
    FXFUSE_CHECK_LAUNCH();
  });
  return 0;
}
