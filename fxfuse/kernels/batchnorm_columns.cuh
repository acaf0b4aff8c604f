// The mathematics of scale and BatchNorm, column by column, on the bare product acc = x W^T.
//
// z = s (acc + b) with s = multiplier * scale / divisor, and out = gamma (z - E z) / sqrt(Var z + eps) + beta. In training
// the bias and the mean cancel: out = gamma s rstd (acc - E acc) + beta with rstd = 1 / sqrt(s^2 Var acc + eps).
#pragma once

#include "column_vector.cuh"

namespace fxfuse {

// Count, mean and sum of squared distances from the mean: merged without cancellation (Chan, Golub, LeVeque 1983).
struct Moments {
  float count, mean, m2;
};
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  const float delta = b.mean - a.mean, share = count > 0.f ? __fdividef(b.count, count) : 0.f;  // no branch: loads overlap
  return {count, fmaf(delta, share, a.mean), a.m2 + b.m2 + delta * delta * a.count * share};
}

// What the module says about each column.
struct LinearScale {
  ColumnVector bias, scale, divisor;
  float multiplier;
  __device__ __forceinline__ float s(int64_t column) const {
    return multiplier * scale.at(column, 1.f) / divisor.at(column, 1.f);
  }
};
struct BatchNormAffine {
  ColumnVector gamma, beta;
  float eps;
};

// out = (acc * s + e) * g + b
struct ColumnMap {
  float s, e, g, b;
  __device__ __forceinline__ float operator()(float acc) const { return fmaf(fmaf(acc, s, e), g, b); }
};

// Training: from the three rows (mean of acc, gamma s rstd, beta) that `finish_column` wrote, each `columns` long.
struct TrainColumns {
  const float* rows;
  int64_t columns;
  __device__ __forceinline__ ColumnMap at(int64_t c) const {
    return {1.f, -rows[c], rows[columns + c], rows[2 * columns + c]};
  }
};

// Evaluation: from the running statistics.
struct EvalColumns {
  LinearScale linear;
  BatchNormAffine norm;
  ColumnVector running_mean, running_var;
  __device__ __forceinline__ ColumnMap at(int64_t c) const {
    const float s = linear.s(c), rstd = rsqrtf(running_var.at(c, 1.f) + norm.eps);
    return {s, linear.bias.at(c, 0.f) * s - running_mean.at(c, 0.f), norm.gamma.at(c, 1.f) * rstd, norm.beta.at(c, 0.f)};
  }
  // The same as acc * x + y, computed in Real: for epilogues, which have room for two numbers a column.
  template <typename Real>
  __device__ __forceinline__ float2 folded(int64_t c) const {
    const Real s = Real(linear.multiplier) * linear.scale.at(c, 1.f) / linear.divisor.at(c, 1.f);
    const Real g = norm.gamma.at(c, 1.f) / sqrt(Real(running_var.at(c, 1.f)) + Real(norm.eps));
    const Real e = linear.bias.at(c, 0.f) * s - running_mean.at(c, 0.f);
    return {float(s * g), float(fma(e, g, Real(norm.beta.at(c, 0.f))))};
  }
};

// What a training step does with a column's statistics besides normalising it.
struct TrainState {
  LinearScale linear;
  BatchNormAffine norm;
  ColumnOutput running_mean, running_var;  // null: not tracked
  float momentum;
  float* saved;  // [3, columns]: mean of acc, rstd, and what rounding left out of the mean; for the backward pass
  int64_t columns;
  int64_t* batches = nullptr;  // null: not counted

  // What a column's statistics are combined with; loaded early where latency counts.
  struct Known {
    float s, gamma, beta;
  };
  __device__ __forceinline__ Known known(int64_t c) const {
    return {linear.s(c), norm.gamma.at(c, 1.f), norm.beta.at(c, 0.f)};
  }
  __device__ __forceinline__ float rstd(const Known& k, const Moments& m) const {
    return rsqrtf(k.s * k.s * (m.m2 / m.count) + norm.eps);
  }
  // The column's map. The mean is m.mean + rest: of few rows with a large mean its rounding would be all the error.
  __device__ __forceinline__ ColumnMap map(const Known& k, const Moments& m, float rest = 0.f) const {
    const float slope = k.gamma * k.s * rstd(k, m);
    return {1.f, -m.mean, slope, fmaf(-rest, slope, k.beta)};
  }
  // What the running statistics are updated from; loaded early where latency counts.
  struct Before {
    float bias, mean, var;
  };
  __device__ __forceinline__ Before before(int64_t c) const {
    if (running_mean.data == nullptr) return {0.f, 0.f, 0.f};
    return {linear.bias.at(c, 0.f), running_mean.read().at(c, 0.f), running_var.read().at(c, 0.f)};
  }
  // Updates the running statistics (torch's rules: unbiased variance) and saves.
  __device__ __forceinline__ void record(int64_t c, const Known& k, const Moments& m, float rest = 0.f) const {
    record(c, k, before(c), m, rest);
  }
  __device__ __forceinline__ void record(int64_t c, const Known& k, const Before& before, const Moments& m, float rest = 0.f) const {
    if (running_mean.data != nullptr) {
      const float z_mean = k.s * (m.mean + before.bias);
      const float unbiased = k.s * k.s * (m.m2 / (m.count - 1.f));
      running_mean.set(c, momentum * z_mean + (1.f - momentum) * before.mean);
      running_var.set(c, momentum * unbiased + (1.f - momentum) * before.var);
    }
    if (c == 0 && batches != nullptr) *batches += 1;
    saved[c] = m.mean;
    saved[columns + c] = rstd(k, m);
    saved[2 * columns + c] = rest;
  }
  __device__ __forceinline__ ColumnMap finish_column(int64_t c, const Moments& m, float rest = 0.f) const {
    const Known k = known(c);
    record(c, k, m, rest);
    return map(k, m, rest);
  }
};

}  // namespace fxfuse
