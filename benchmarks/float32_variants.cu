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

constexpr int kNever = 1 << 20;

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
    case 3: return run<Float32Mainloop<false, false, 1>>(p, band, device, s);
    case 4: return run<Float32Mainloop<false, true, 1>>(p, band, device, s);
    case 5: return run<Float32Mainloop<true, true, 1>>(p, band, device, s);
    // By interval, without sums in between: 32, 64, 128, 256, 512, all of K.
    case 6: return run<Float32Mainloop<false, false, 1, 32, kNever>>(p, band, device, s);
    case 7: return run<Float32Mainloop<false, false, 1, 64, kNever>>(p, band, device, s);
    case 8: return run<Float32Mainloop<false, false, 1, 128, kNever>>(p, band, device, s);
    case 9: return run<Float32Mainloop<false, false, 1, 256, kNever>>(p, band, device, s);
    case 10: return run<Float32Mainloop<false, false, 1, 512, kNever>>(p, band, device, s);
    case 11: return run<Float32Mainloop<false, false, 1, kNever, kNever>>(p, band, device, s);
#endif
  }
  return int(cudaErrorInvalidValue);
}
