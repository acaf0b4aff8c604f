// A number for each column, as a module keeps it (weights, biases, running statistics): any dtype, or absent.
#pragma once

#include "common.cuh"

namespace fxfuse {

// `code` is a DType; plus kOneForAll where a single number stands for every column. A null pointer reads as the default.
constexpr int kOneForAll = 8;

struct ColumnVector {
  const void* data;
  int code;

  __device__ __forceinline__ bool given() const { return data != nullptr; }
  // Without branches, so that the loads of many columns and vectors are in flight together.
  __device__ __forceinline__ float at(int64_t column, float absent) const {
    const int type = code & ~kOneForAll;
    const uint32_t raw = load(address(column), data == nullptr ? 0 : bytes());
    const float wide = __uint_as_float(type == kFloat32 ? raw : raw << 16);
    const float x = type == kFloat16 ? __half2float(__ushort_as_half(static_cast<unsigned short>(raw))) : wide;
    return data == nullptr ? absent : x;
  }

 private:
  __device__ __forceinline__ int bytes() const { return (code & ~kOneForAll) == kFloat32 ? 4 : 2; }
  __device__ __forceinline__ const char* address(int64_t column) const {
    return static_cast<const char*>(data) + (code & kOneForAll ? 0 : column * bytes());
  }
  // `bytes` is 4, 2, or 0 for no load at all.
  static __device__ __forceinline__ uint32_t load(const void* address, int bytes) {
    uint32_t raw;
    asm("{\n"
        ".reg .pred four, two;\n"
        ".reg .b16 low;\n"
        "setp.eq.s32 four, %2, 4;\n"
        "setp.eq.s32 two, %2, 2;\n"
        "mov.b16 low, 0;\n"
        "mov.b32 %0, 0;\n"
        "@four ld.global.b32 %0, [%1];\n"
        "@two ld.global.b16 low, [%1];\n"
        "@two cvt.u32.u16 %0, low;\n"
        "}"
        : "=&r"(raw)
        : "l"(address), "r"(bytes));
    return raw;
  }
};

// The same, written in place.
struct ColumnOutput {
  void* data;
  int code;

  __device__ __forceinline__ void set(int64_t column, float x) const {
    if (data == nullptr) return;
    switch (code & ~kOneForAll) {
      case kFloat16: static_cast<__half*>(data)[column] = __float2half_rn(x); break;
      case kBFloat16: static_cast<__nv_bfloat16*>(data)[column] = __float2bfloat16_rn(x); break;
      default: static_cast<float*>(data)[column] = x;
    }
  }
  __device__ __forceinline__ ColumnVector read() const { return {data, code}; }
};

}  // namespace fxfuse
