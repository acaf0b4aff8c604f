// Epilogues of linear_scale_batchnorm1d: the whole op in evaluation; in training the whole op for batches of which the grid
// holds all rows at once, else product and column statistics.
#pragma once

#include "../batchnorm_columns.cuh"
#include "dispatch.cuh"
#include "float32_gemm.cuh"

#include <type_traits>

namespace fxfuse::hopper {

// out = acc * x + y with each column's two numbers folded from scale, bias and running statistics: in float64 where the
// product is a float32 one (EXACT). Elsewhere float32 is far more than the product's rounding leaves, and on many blocks at
// once float64 costs the tensor cores 3 to 5 % of their time.
template <bool EXACT>
struct BatchNormEvalEpilogue {
  static constexpr bool kColumns = true, kStatistics = false, kBatch = false;
  using Params = EvalColumns;
  struct Apply {
    __device__ __forceinline__ float operator()(float x, float2 column) const { return fmaf(x, column.x, column.y); }
  };
  static __device__ __forceinline__ float2 column(const Params& p, int n) { return p.folded<std::conditional_t<EXACT, double, float>>(n); }
  template <typename Body>
  static __device__ __forceinline__ void with(const Params&, Body&& body) { body(Apply{}); }
};

// The bare product, and (mean, M2) of each column of every 64 rows.
struct StatisticsEpilogue {
  static constexpr bool kColumns = false, kStatistics = true, kBatch = false;
  struct Params {
    float2* partials;  // [ceil(M / 64), N]
  };
  template <typename Body>
  static __device__ __forceinline__ void with(const Params&, Body&& body) { body(Identity::Apply{}); }
};

// The whole op in training: out = (acc - mean) * slope + shift with the batch's statistics. KEEP: acc is written too, for
// the backward pass.
template <bool KEEP>
struct BatchNormTrainEpilogue {
  static constexpr bool kColumns = false, kStatistics = true, kBatch = true, kKeep = KEEP;
  struct Params {
    TrainState state;
    float2* partials;  // [ceil(M / 64), N]
    float2* maps;      // [N]: slope and shift, where tiles are normalised behind the tensor cores
    BatchCounters counters;  // for ceil(N / 64) columns of tiles at most
  };
};

}  // namespace fxfuse::hopper
