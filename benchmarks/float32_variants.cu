// Variants of the float32 mainloop with no epilogue, by number, for benchmarks/device_float32.py.
#include "../fxfuse/kernels/hopper/float32_mainloop.cuh"
#include "../fxfuse/kernels/hopper/gemm.cuh"

using namespace fxfuse;
using namespace fxfuse::hopper;

template <typename Mainloop>
int run(const Operands& p, int band, int device, cudaStream_t stream) {
  const DeviceProps* props = nullptr;
  FXFUSE_CHECK(device_props(device, &props));
  return int(launch_gemm<Mainloop, Identity, float, 2>(p, {}, band, device, props->sm_count, stream));
}

// Contiguous operands; those along M or N are transposed in memory.
FXFUSE_API int float32_variant(int variant, const void* a, const void* b, void* out, int64_t m, int64_t n, int64_t k,
                               int64_t pitch_a, int64_t pitch_b, int band, int device, void* stream) {
  const Operands p{a, b, out, m, n, k, pitch_a, pitch_b, n};
  const auto s = static_cast<cudaStream_t>(stream);
  switch (variant) {
    case 0: return run<Float32Mainloop<false, false>>(p, band, device, s);
#ifndef FEW
    case 1: return run<Float32Mainloop<false, true>>(p, band, device, s);
    case 2: return run<Float32Mainloop<true, true>>(p, band, device, s);
    case 3: return run<Float32Mainloop<false, false, 1, 32>>(p, band, device, s);
    case 4: return run<Float32Mainloop<false, false, 1, 64>>(p, band, device, s);
    case 5: return run<Float32Mainloop<false, false, 1, 128>>(p, band, device, s);
    case 6: return run<Float32Mainloop<false, false, 1, 512>>(p, band, device, s);
    case 7: return run<Float32Mainloop<false, false, 1, 1 << 20>>(p, band, device, s);
#endif
  }
  return int(cudaErrorInvalidValue);
}
