// The tensor cores: wgmma of one warpgroup, both operands in 128-byte swizzled shared memory, float32 accumulators.
//
// A warpgroup multiplies a 64 x K tile of A by an N x K tile of B where K is 32 bytes. Both have K contiguous; of 16-bit
// elements B, or A and B, may lie the other way, rows along M or N. Accumulator i of a thread: row
// 16 * warp + lane / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (lane % 4) + i % 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fxfuse::hopper {

constexpr int kInstructionM = 64;
constexpr int kInstructionBytes = 32;  // of K, per row

struct TF32 {};  // float32 in memory, of which the tensor cores read the upper 19 bits

// Describes a K-contiguous tile: rows of 128 bytes, groups of 8 rows 1024 bytes apart, 128-byte swizzle. The tile starts
// at a multiple of 1024 bytes; adding `bytes / 16` steps along K inside a row.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kGroupStride = uint64_t(1024 >> 4) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzle128 | kGroupStride | kUnused | ((shared & 0x3FFFF) >> 4);
}

// Describes a tile that lies along M or N: boxes of `rows` rows of 128 bytes, a row for each element along K, side by side and
// 128-byte swizzled. Groups of 8 rows are 1024 bytes apart, boxes 128 * rows bytes. Adding 8 steps one row along K.
__device__ __forceinline__ uint64_t matrix_descriptor_across(uint32_t shared, int rows) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kGroupStride = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kGroupStride | uint64_t(rows * 128 >> 4) << 16 | ((shared & 0x3FFFF) >> 4);
}

// As matrix_descriptor for rows of 64 bytes: groups of 8 rows 512 bytes apart, 64-byte swizzle (16-byte unit u of row r lies
// at unit u ^ (r / 2 % 4)). The tile starts at a multiple of 512 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor_64(uint32_t shared) {
  constexpr uint64_t kSwizzle64 = uint64_t(2) << 62, kGroupStride = uint64_t(512 >> 4) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzle64 | kGroupStride | kUnused | ((shared & 0x3FFFF) >> 4);
}

// Accumulators may be read or written by other instructions before / after. Before the first wgmma of a batch.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING committed batches are unfinished.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving accumulators across this point while wgmma works on them.
template <int COUNT>
__device__ __forceinline__ void wgmma_pin(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// clang-format off
#define FXFUSE_ACC_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FXFUSE_ACC_32(i) FXFUSE_ACC_8(i), FXFUSE_ACC_8(i + 8), FXFUSE_ACC_8(i + 16), FXFUSE_ACC_8(i + 24)
#define FXFUSE_ACCS_32 FXFUSE_ACC_32(0)
#define FXFUSE_ACCS_64 FXFUSE_ACCS_32, FXFUSE_ACC_32(32)
#define FXFUSE_ACCS_128 FXFUSE_ACCS_64, FXFUSE_ACC_32(64), FXFUSE_ACC_32(96)
#define FXFUSE_LIST_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FXFUSE_LIST_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FXFUSE_LIST_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// d += A B (d = A B where accumulate is 0). A, B, P: the numbers of the operands that follow the accumulators; what else
// the instruction is told is in MODIFIERS, whose own operands follow those.
#define FXFUSE_WGMMA(SHAPE_AND_TYPES, COUNT, A, B, P, MODIFIERS, ...)                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                        \
               "wgmma.mma_async.sync.aligned." SHAPE_AND_TYPES " {" FXFUSE_LIST_##COUNT "}, %" #A ", %" #B ", p, " MODIFIERS ";\n}" \
               : FXFUSE_ACCS_##COUNT : "l"(a), "l"(b), "r"(accumulate) __VA_ARGS__)
#define FXFUSE_WGMMA_16_BIT(TYPES)                                                                                     \
  template <bool A_ALONG_M, bool B_ALONG_N>                                                                            \
  static __device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {           \
    FXFUSE_WGMMA("m64n256k16.f32." TYPES, 128, 128, 129, 130, "1, 1, %131, %132", , "n"(int(A_ALONG_M)), "n"(int(B_ALONG_N))); \
  }                                                                                                                    \
  template <bool A_ALONG_M, bool B_ALONG_N>                                                                            \
  static __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {            \
    FXFUSE_WGMMA("m64n128k16.f32." TYPES, 64, 64, 65, 66, "1, 1, %67, %68", , "n"(int(A_ALONG_M)), "n"(int(B_ALONG_N)));       \
  }                                                                                                                    \
  template <bool A_ALONG_M, bool B_ALONG_N>                                                                            \
  static __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {            \
    FXFUSE_WGMMA("m64n64k16.f32." TYPES, 32, 32, 33, 34, "1, 1, %35, %36", , "n"(int(A_ALONG_M)), "n"(int(B_ALONG_N)));        \
  }
// clang-format on

// A_ALONG_M, B_ALONG_N: described by matrix_descriptor_across.
template <typename Element>
struct Wgmma;

template <>
struct Wgmma<__nv_bfloat16> {
  FXFUSE_WGMMA_16_BIT("bf16.bf16")
};
template <>
struct Wgmma<__half> {
  FXFUSE_WGMMA_16_BIT("f16.f16")
};
template <>
struct Wgmma<TF32> {
  template <bool A_ALONG_M, bool B_ALONG_N>
  static __device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
    static_assert(!A_ALONG_M && !B_ALONG_N, "of 16-bit elements only");
    FXFUSE_WGMMA("m64n256k8.f32.tf32.tf32", 128, 128, 129, 130, "1, 1");
  }
  template <bool A_ALONG_M, bool B_ALONG_N>
  static __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    static_assert(!A_ALONG_M && !B_ALONG_N, "of 16-bit elements only");
    FXFUSE_WGMMA("m64n128k8.f32.tf32.tf32", 64, 64, 65, 66, "1, 1");
  }
  template <bool A_ALONG_M, bool B_ALONG_N>
  static __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    static_assert(!A_ALONG_M && !B_ALONG_N, "of 16-bit elements only");
    FXFUSE_WGMMA("m64n64k8.f32.tf32.tf32", 32, 32, 33, 34, "1, 1");
  }
};

// A in registers: a[0], a[1] are rows lane / 4 and lane / 4 + 8 of the warp's 16 at columns 2 * (lane % 4) + {0, 1} of K,
// a[2], a[3] the same rows eight columns on.
// B as in matrix_descriptor_64, by the descriptor's low word.
// clang-format off
#define FXFUSE_WGMMA_FROM_REGISTERS(N, COUNT, A0, A1, A2, A3, B, P)                                                    \
  __device__ __forceinline__ void wgmma_bf16(float (&d)[COUNT], const uint32_t (&a)[4], uint32_t b, int accumulate) {   \
    asm volatile("{\n.reg .pred p;\n.reg .b64 descriptor;\nsetp.ne.b32 p, %" #P ", 0;\n"                             \
                 "mov.b64 descriptor, {%" #B ", 0x80000020};\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" FXFUSE_LIST_##COUNT "}, "                \
                 "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, descriptor, p, 1, 1, 0;\n}"                                \
                 : FXFUSE_ACCS_##COUNT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate));         \
  }
FXFUSE_WGMMA_FROM_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69)
FXFUSE_WGMMA_FROM_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37)
// clang-format on

#undef FXFUSE_WGMMA_FROM_REGISTERS
#undef FXFUSE_WGMMA_16_BIT
#undef FXFUSE_WGMMA

}  // namespace fxfuse::hopper
