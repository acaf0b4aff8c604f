// From a float32 product's size to an instance of the float32 GEMM.
#pragma once

#include "float32_mainloop.cuh"
#include "gemm.cuh"

namespace fxfuse::hopper {

// Rows of tiles in a band of the tile order.
constexpr int kFloat32Band = 4;

// Tiles of 256 x 128, unless more of the device works on tiles of 128 x 128, a round of which takes 0.72 of the time; or
// narrow ones, where all of them run at once (narrow_rule.py repeats this choice to tell how long it takes).
template <typename Epilogue, bool A_ALONG_M = false, bool B_ALONG_N = false>
cudaError_t float32_gemm(const Operands& p, const typename Epilogue::Params& epilogue, int device, int sm_count,
                         cudaStream_t stream) {
  const int64_t rows = ceil_div<int64_t>(p.m, 128), columns = ceil_div<int64_t>(p.n, 128);
  if (rows <= sm_count && rows * ceil_div<int64_t>(p.n, 64) <= sm_count - sm_count % rows)
    return launch_gemm<Float32Mainloop<A_ALONG_M, B_ALONG_N, 1, 32, 512, 4, 6, 6, 64>, Epilogue, float, 2>(
        p, epilogue, 2 * kFloat32Band, device, sm_count, stream);
  const int64_t large = ceil_div(ceil_div<int64_t>(p.m, 256) * columns, int64_t(sm_count));
  const int64_t small = ceil_div(rows * columns, int64_t(sm_count));
  if (18 * small < 25 * large)
    return launch_gemm<Float32Mainloop<A_ALONG_M, B_ALONG_N, 1>, Epilogue, float, 2>(p, epilogue, 2 * kFloat32Band, device,
                                                                                     sm_count, stream);
  return launch_gemm<Float32Mainloop<A_ALONG_M, B_ALONG_N, 2>, Epilogue, float, 2>(p, epilogue, kFloat32Band, device,
                                                                                   sm_count, stream);
}

}  // namespace fxfuse::hopper
