// From a problem's size and dtype to an instance of the GEMM.
#pragma once

#include "gemm.cuh"

namespace fxfuse::hopper {

// Rows of clusters in a band of the tile order: about as many rows of the result as columns, for a full device.
constexpr int kBand = 8;

// The element type that the tensor cores see for a dtype code, and the result's type.
template <typename T> struct TensorCoreElement { using type = T; };
template <> struct TensorCoreElement<float> { using type = TF32; };

// Large tiles shared by clusters of two, unless that leaves much of the device idle: then narrow ones, where all of them run
// at once (narrow_rule.py repeats this choice to tell how long it takes). A narrow tile in 16 bits is one chunk of 64 columns,
// and a block has one tile: a second buffer of the writer would stay empty.
template <typename Epilogue, typename In, typename Out>
cudaError_t gemm(const Operands& p, const typename Epilogue::Params& epilogue, int device, int sm_count, cudaStream_t stream) {
  using Element = typename TensorCoreElement<In>::type;
  const int64_t large = ceil_div<int64_t>(p.m, 256) * 2 * ceil_div<int64_t>(p.n, 256);
  if (p.m > 128 && 4 * large >= 3 * sm_count)
    return launch_gemm<DirectMainloop<Element, 256, 4, 2>, Epilogue, Out, 2>(p, epilogue, kBand, device, sm_count, stream);
  const int64_t rows = ceil_div<int64_t>(p.m, 128), columns = ceil_div<int64_t>(p.n, 64);
  if (rows <= sm_count && rows * columns <= sm_count - sm_count % rows)
    return launch_gemm<DirectMainloop<Element, 64, 8, 1>, Epilogue, Out, sizeof(Out) == 2 ? 1 : 2>(p, epilogue, kBand, device,
                                                                                                   sm_count, stream);
  return launch_gemm<DirectMainloop<Element, 128, 5, 1>, Epilogue, Out, 2>(p, epilogue, kBand, device, sm_count, stream);
}

// The product itself, of 16-bit operands that may lie along M and N (see DirectMainloop).
template <typename In, bool A_ALONG_M, bool B_ALONG_N>
cudaError_t plain_gemm(const Operands& p, int device, int sm_count, cudaStream_t stream) {
  using Mainloop = DirectMainloop<In, 256, 4, 2, A_ALONG_M, B_ALONG_N>;
  return launch_gemm<Mainloop, Identity, In, 2>(p, {}, kBand, device, sm_count, stream);
}

}  // namespace fxfuse::hopper
