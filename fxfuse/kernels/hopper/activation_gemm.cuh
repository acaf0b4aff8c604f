// Epilogue: bias, activation, scales.
#pragma once

#include "../activation.cuh"
#include "../column_vector.cuh"
#include "dispatch.cuh"
#include "float32_gemm.cuh"

namespace fxfuse::hopper {

// scale * act(pre_scale * (x + bias[column])). A column's numbers: pre_scale * bias.
struct ActivationEpilogue {
  static constexpr bool kColumns = true, kStatistics = false, kBatch = false;
  struct Params {
    ColumnVector bias;
    int kind;
    float alpha, beta, pre_scale, scale;
  };
  static __device__ __forceinline__ float2 column(const Params& p, int n) {
    return {p.pre_scale * p.bias.at(n, 0.f), 0.f};
  }
  template <typename Act>
  struct Apply {
    Act act;
    float pre_scale, scale;
    __device__ __forceinline__ float operator()(float x, float2 column) const {
      return scale * act.value(fmaf(x, pre_scale, column.x));
    }
  };
  // The activation is chosen once a tile, not once an element.
  template <typename Body>
  static __device__ __forceinline__ void with(const Params& p, Body&& body) {
    with_activation<true>(p.kind, p.alpha, p.beta, [&](auto act) {
      body(Apply<decltype(act)>{act, p.pre_scale, p.scale});
    });
  }
};

// ieee: float32 products are float32, not TF32.
inline cudaError_t activation_gemm(const Operands& p, const ActivationEpilogue::Params& params, int ieee, int dtype,
                                   int device, int sm_count, cudaStream_t stream) {
  if (ieee && dtype == kFloat32) return float32_gemm<ActivationEpilogue>(p, params, device, sm_count, stream);
  switch (dtype) {
    case kFloat32: return gemm<ActivationEpilogue, float, float>(p, params, device, sm_count, stream);
    case kFloat16: return gemm<ActivationEpilogue, __half, __half>(p, params, device, sm_count, stream);
    case kBFloat16: return gemm<ActivationEpilogue, __nv_bfloat16, __nv_bfloat16>(p, params, device, sm_count, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fxfuse::hopper
