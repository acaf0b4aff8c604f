// A product of 16-bit matrices on Hopper, either of which may lie the other way round: the GEMM of hopper/ with no epilogue.
#include "hopper/dispatch.cuh"

using namespace fxfuse;

namespace {

template <typename Body>
int with_half(int dtype, Body&& body) {
  if (dtype == kFloat16) return int(body(__half{}));
  if (dtype == kBFloat16) return int(body(__nv_bfloat16{}));
  return int(cudaErrorInvalidValue);
}

}  // namespace

// out[m, n] = A B^T, contiguous. a is A [m, k], or its transpose [k, m] where a_along_m; b is B [n, k], or [k, n] where
// b_along_n. Rows of a and b pitch_a, pitch_b elements apart; bases and pitches in multiples of 16 bytes, and so rows of out.
// cudaErrorNotSupported for a_along_m without b_along_n.
FXFUSE_API int fxfuse_half_gemm(const void* a, const void* b, void* out, int64_t m, int64_t n, int64_t k, int64_t pitch_a,
                                int64_t pitch_b, int a_along_m, int b_along_n, int dtype, int device, void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  if (!is_hopper(*props) || (a_along_m && !b_along_n)) return int(cudaErrorNotSupported);
  const hopper::Operands operands{a, b, out, m, n, k, pitch_a, pitch_b, n};
  const auto s = static_cast<cudaStream_t>(stream);
  return with_half(dtype, [&](auto type) {
    using T = decltype(type);
    if (a_along_m) return hopper::plain_gemm<T, true, true>(operands, device, props->sm_count, s);
    if (b_along_n) return hopper::plain_gemm<T, false, true>(operands, device, props->sm_count, s);
    return hopper::plain_gemm<T, false, false>(operands, device, props->sm_count, s);
  });
}

// The gradients of x weight^T for dz[m, n]: dx[m, k] = dz weight and dw[n, k] = dz^T x, contiguous, each where not null. x[m, k]
// and weight[n, k] with rows pitch_x, pitch_w elements apart, dz contiguous; bases and pitches in multiples of 16 bytes, and so
// rows of all.
FXFUSE_API int fxfuse_half_gemm_gradients(const void* dz, const void* x, const void* weight, void* dx, void* dw, int64_t m,
                                          int64_t n, int64_t k, int64_t pitch_x, int64_t pitch_w, int dtype, int device,
                                          void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  if (!is_hopper(*props)) return int(cudaErrorNotSupported);
  const auto s = static_cast<cudaStream_t>(stream);
  return with_half(dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t error = cudaSuccess;
    const hopper::Operands by_x{dz, weight, dx, m, k, n, n, pitch_w, k}, by_weight{dz, x, dw, n, k, m, n, pitch_x, k};
    if (dx != nullptr) error = hopper::plain_gemm<T, false, true>(by_x, device, props->sm_count, s);
    if (dw != nullptr && error == cudaSuccess)
      error = hopper::plain_gemm<T, true, true>(by_weight, device, props->sm_count, s);
    return error;
  });
}
