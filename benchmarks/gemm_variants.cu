// Variants of the Hopper GEMM with no epilogue, by number, for benchmarks/device_gemm.py.
#include "../fxfuse/kernels/hopper/gemm.cuh"

using namespace fxfuse;
using namespace fxfuse::hopper;

template <typename Element, typename Out, int BN, int STAGES, int CLUSTER, int BUFFERS, int STAGGER>
int run(const Operands& p, int band, int device, cudaStream_t stream) {
  const DeviceProps* props = nullptr;
  FXFUSE_CHECK(device_props(device, &props));
  using Mainloop = DirectMainloop<Element, BN, STAGES, CLUSTER, false, false, STAGGER>;
  return int(launch_gemm<Mainloop, Identity, Out, BUFFERS>(p, {}, band, device, props->sm_count, stream));
}

// dtype: 1 float16, 2 bfloat16, 3 TF32 (float32 in and out); out has the dtype of the operands.
template <int BN, int STAGES, int CLUSTER, int BUFFERS, int STAGGER>
int run(int dtype, const Operands& p, int band, int device, cudaStream_t stream) {
  switch (dtype) {
    case 1: return run<__half, __half, BN, STAGES, CLUSTER, BUFFERS, STAGGER>(p, band, device, stream);
    case 2: return run<__nv_bfloat16, __nv_bfloat16, BN, STAGES, CLUSTER, BUFFERS, STAGGER>(p, band, device, stream);
    case 3: return run<TF32, float, BN, STAGES, CLUSTER, BUFFERS, STAGGER>(p, band, device, stream);
  }
  return int(cudaErrorInvalidValue);
}

FXFUSE_API int gemm_variant(int variant, const void* a, const void* b, void* out, int64_t m, int64_t n, int64_t k, int band,
                            int dtype, int device, void* stream) {
  const Operands p{a, b, out, m, n, k, k, k, n};
  const auto s = static_cast<cudaStream_t>(stream);
  switch (variant) {
    case 0: return run<256, 4, 2, 2, 0>(dtype, p, band, device, s);
    case 1: return run<256, 3, 2, 4, 0>(dtype, p, band, device, s);
    case 2: return run<256, 4, 1, 2, 0>(dtype, p, band, device, s);
    case 3: return run<128, 6, 2, 2, 0>(dtype, p, band, device, s);
    case 4: return run<256, 4, 2, 2, 1>(dtype, p, band, device, s);
    case 5: return run<256, 4, 2, 2, 2>(dtype, p, band, device, s);
    case 6: return run<256, 3, 2, 4, 1>(dtype, p, band, device, s);
  }
  return int(cudaErrorInvalidValue);
}
