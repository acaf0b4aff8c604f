// The copy engine: boxes of a row-major matrix between global memory and 128-byte swizzled shared memory.
//
// Every box is 128 bytes wide. In shared memory row r of a box starts at byte 128 r, and its 16-byte unit u lies at unit
// u ^ (r % 8): the layout that wgmma reads as "128B swizzle" and that stores without bank conflicts.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common.cuh"
#include "barrier.cuh"

namespace fxfuse::hopper {

constexpr int kRowBytes = 128;   // width of a box
constexpr int kUnitBytes = 16;   // what the swizzle moves

// --- device ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Box at (column, row), in elements, into `smem`; its bytes are counted at `bar`.
__device__ __forceinline__ void tma_load(uint32_t smem, const CUtensorMap* map, uint32_t bar, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem),
      "l"(map), "r"(bar), "r"(column), "r"(row)
      : "memory");
}

// The same into the same place of every block of the cluster in `mask`, counted at each block's own `bar`.
__device__ __forceinline__ void tma_load_multicast(uint32_t smem, const CUtensorMap* map, uint32_t bar, int column, int row,
                                                   uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem),
      "l"(map), "r"(bar), "r"(column), "r"(row), "h"(mask)
      : "memory");
}

// `smem` to the box at (column, row); what lies outside the matrix is not written. Ends a group of its own.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t smem, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
               "cp.async.bulk.commit_group;" ::"l"(map), "r"(smem), "r"(column), "r"(row)
               : "memory");
}
// Waits until at most PENDING of this thread's stores still have to read their shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void tma_store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// --- host: the tensor map -----------------------------------------------------------------------------------------------------

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, found at run time so that nothing links against libcuda. Null where the driver lacks it.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return e == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found) : nullptr;
  }();
  return function;
}

// Describes a row-major matrix of `rows` x `columns` elements, rows `pitch` elements apart, read or written in boxes of
// `box_rows` rows (at most 256) by `box_bytes`: 128 and swizzled, or 64 and plain. Elements outside read as zero. Needs a
// base and a pitch of 16-byte multiples.
inline cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes, const void* base,
                                   int64_t rows, int64_t columns, int64_t pitch, int box_rows, int box_bytes = kRowBytes) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t stride[1] = {cuuint64_t(pitch) * element_bytes};
  const cuuint32_t box[2] = {cuuint32_t(box_bytes / element_bytes), cuuint32_t(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_bytes == kRowBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fxfuse::hopper
