// A float32 product on Hopper's tensor cores, as exact as float32 arithmetic: see hopper/float32_mainloop.cuh.
#include "hopper/float32_gemm.cuh"

using namespace fxfuse;

// out[m, n] = A B^T, contiguous. a is A [m, k], or its transpose [k, m] where a_along_m; b is B [n, k], or [k, n] where
// b_along_n. Rows of a and b pitch_a, pitch_b elements apart; bases and pitches in multiples of 16 bytes, and so rows of out.
// cudaErrorNotSupported for a_along_m without b_along_n.
FXFUSE_API int fxfuse_float32_gemm(const void* a, const void* b, void* out, int64_t m, int64_t n, int64_t k, int64_t pitch_a,
                                   int64_t pitch_b, int a_along_m, int b_along_n, int device, void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  if (!is_hopper(*props) || (a_along_m && !b_along_n)) return int(cudaErrorNotSupported);
  const hopper::Operands operands{a, b, out, m, n, k, pitch_a, pitch_b, n};
  const auto s = static_cast<cudaStream_t>(stream);
  using hopper::float32_gemm;
  using hopper::Identity;
  if (a_along_m) return int((float32_gemm<Identity, true, true>(operands, {}, device, props->sm_count, s)));
  if (b_along_n) return int((float32_gemm<Identity, false, true>(operands, {}, device, props->sm_count, s)));
  return int((float32_gemm<Identity, false, false>(operands, {}, device, props->sm_count, s)));
}
