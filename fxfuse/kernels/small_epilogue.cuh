// What stands behind a small product: bias, activation and factors; BatchNorm by running statistics; BatchNorm by the
// batch's. Each thread has its sums of one column in registers, so a column's numbers are fetched once.
//
// Training needs a column's mean before it needs the squares of the distances from it: two rounds through shared memory,
// from the float32 sums, in a fixed order. Nothing is squared that has not been centred.
#pragma once

#include "activation.cuh"
#include "batchnorm_columns.cuh"
#include "small_gemm.cuh"

namespace fxfuse::small {

// scale * act(pre_scale * (acc + b))
template <bool FAST>
struct ActivationEpilogue {
  ColumnVector bias;
  int activation;
  float alpha, beta, pre_scale, scale;

  using Column = float;
  __device__ __forceinline__ Column column(int64_t n) const { return bias.at(n, 0.f); }
  template <typename Tile>
  __device__ __forceinline__ void finish(float (&v)[Tile::kRows], Column b, const Place&, float*) const {
    with_activation<FAST>(activation, alpha, beta, [&](auto act) {
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) v[i] = scale * act.value(pre_scale * (v[i] + b));
    });
  }
};

// acc * x + y, folded in float64 where results are float32's (float64 is what the fold costs, once a column), in float32
// where the product is rounded far more coarsely.
template <bool FAST>
struct EvalEpilogue {
  EvalColumns columns;

  using Column = float2;
  __device__ __forceinline__ Column column(int64_t n) const {
    return columns.template folded<std::conditional_t<FAST, float, double>>(n);
  }
  template <typename Tile>
  __device__ __forceinline__ void finish(float (&v)[Tile::kRows], Column c, const Place&, float*) const {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) v[i] = fmaf(v[i], c.x, c.y);
  }
};

// gamma * s * rstd * (acc - mean) + beta; the running statistics and the count of batches move on. Sums over the batch are
// float64's where results are float32's: eager's round every element by itself, and that averages out.
template <bool FAST>
struct TrainEpilogue {
  using Sum = std::conditional_t<FAST, float, double>;
  LinearScale linear;
  BatchNormAffine norm;
  ColumnOutput running_mean, running_var;  // null: not tracked
  double multiplier, momentum;             // as Python has them: rounded, they would move whole columns
  int64_t* batches;  // null: not counted

  struct Column {
    float scale, divisor, gamma, beta;
  };
  __device__ __forceinline__ Column column(int64_t n) const {
    return {linear.scale.at(n, 1.f), linear.divisor.at(n, 1.f), norm.gamma.at(n, 1.f), norm.beta.at(n, 0.f)};
  }
  template <typename Tile>
  __device__ __forceinline__ void finish(float (&v)[Tile::kRows], const Column& known, const Place& p, float* shared) const {
    const Sum rows = Sum(p.rows);
    Sum sum = 0;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
      if (p.first + i * Tile::kRowStep < p.rows) sum += v[i];
    const float mean = float(total<Tile>(sum, p, shared) / rows);
    Sum squares = 0, left = 0;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const float d = v[i] - mean;
      if (p.first + i * Tile::kRowStep < p.rows) {
        squares += Sum(d) * Sum(d);
        left += d;
      }
    }
    squares = total<Tile>(squares, p, shared);
    left = total<Tile>(left, p, shared);
    const Sum rest = left / rows, m2 = squares - left * rest;  // rest: what rounding left out of the mean
    if (!p.inside) return;
    // One column's numbers in float64, rounded once: an error in them would be the whole column's.
    const double positive = m2 < 0 ? 0. : double(m2);  // max would turn NaN into 0
    const double factor = multiplier * known.scale / known.divisor;
    const double rstd = 1. / sqrt(factor * factor * (positive / rows) + double(norm.eps));
    const float slope = float(known.gamma * factor * rstd), shift = float(known.beta - rest * slope);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) v[i] = fmaf(v[i] - mean, slope, shift);
    if (p.first != 0) return;
    if (p.column == 0 && batches != nullptr) *batches += 1;
    if (running_mean.data == nullptr) return;
    const double z_mean = factor * (double(mean) + rest + linear.bias.at(p.column, 0.f));
    const double unbiased = factor * factor * (positive / (rows - 1));
    const double old_mean = running_mean.read().at(p.column, 0.f), old_var = running_var.read().at(p.column, 0.f);
    running_mean.set(p.column, float(old_mean + momentum * (z_mean - old_mean)));
    running_var.set(p.column, float(old_var + momentum * (unbiased - old_var)));
  }

 private:
  // The sum over the block's threads of one column; every one of them gets it.
  template <typename Tile>
  static __device__ __forceinline__ Sum total(Sum x, const Place& p, float* memory) {
    Sum* shared = reinterpret_cast<Sum*>(memory);
    __syncthreads();
    shared[p.first * Tile::BN + p.lane] = x;
    __syncthreads();
    Sum sum = shared[p.lane];
#pragma unroll
    for (int r = 1; r < Tile::kRowStep; ++r) sum += shared[r * Tile::BN + p.lane];
    return sum;
  }
};

}  // namespace fxfuse::small
