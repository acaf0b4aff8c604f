// The C interface of calls that repeat: linear_activation_scale, and linear_scale_batchnorm1d in evaluation and training,
// as small products with everything behind them, as products of Hopper's GEMM (`_large_`), or (`_after_`) behind a product of the
// library's.
//
// What stays the same from call to call comes in one structure that the caller keeps (small_gemm.py has the same layout):
// a call hands over a few pointers, which is a tenth of the host's work of handing over thirty values.
#include "passes.cuh"
#include "small_epilogue.cuh"

namespace fxfuse::small {
namespace {

struct Vector {
  void* data;    // null: absent
  int64_t code;  // as ColumnVector has it
  operator ColumnVector() const { return {data, int(code)}; }
  operator ColumnOutput() const { return {data, int(code)}; }
};

struct Product {
  const void* weight;
  int64_t m, n, k, pitch_x, pitch_w;  // pitches in elements
  int64_t dtype, out_dtype, ieee, device;
};

struct ActivationCall {
  Product product;
  Vector bias;
  int64_t activation;
  float alpha, beta, pre_scale, scale;
};

struct BatchNormCall {
  Product product;
  Vector bias, scale, divisor, gamma, beta, running_mean, running_var;
  int64_t* batches;
  int64_t block_rows;
  int64_t training;
  double momentum, multiplier;
  float eps;
};

Operands operands(const Product& p, const void* x, void* out) {
  return {x, p.weight, out, p.m, p.n, p.k, p.pitch_x, p.pitch_w, int(p.out_dtype)};
}

}  // namespace
}  // namespace fxfuse::small

using namespace fxfuse;

namespace fxfuse::small {
__global__ void count_kernel(int64_t* batches) { *batches += 1; }
}  // namespace fxfuse::small

// out[m, n] = scale * act(pre_scale * (x W^T + b)), out of x's dtype.
FXFUSE_API int fxfuse_small_linear_activation_scale(const void* call, const void* x, void* out, void* stream) {
  const auto& c = *static_cast<const small::ActivationCall*>(call);
  if (c.product.m == 0 || c.product.n == 0) return 0;
  if (c.activation < kRelu || c.activation > kClamp || c.product.dtype != c.product.out_dtype) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(int(c.product.device), props);
  return int(small::with_kind(int(c.product.dtype), c.product.ieee != 0, [&](auto kind) {
    using Kind = decltype(kind);
    const small::ActivationEpilogue<Kind::kFast> epilogue{c.bias, int(c.activation), c.alpha, c.beta, c.pre_scale, c.scale};
    return small::launch_any<Kind>(small::operands(c.product, x, out), epilogue, props->sm_count,
                                   static_cast<cudaStream_t>(stream));
  }));
}

// out[m, n] = the op; in training for at most 256 rows, running statistics and the count of batches updated.
FXFUSE_API int fxfuse_small_linear_scale_batchnorm1d(const void* call, const void* x, void* out, void* stream) {
  const auto& c = *static_cast<const small::BatchNormCall*>(call);
  const auto& p = c.product;
  if (p.m == 0 || p.n == 0) return 0;
  if (p.out_dtype != p.dtype && p.out_dtype != kFloat32) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(int(p.device), props);
  const LinearScale linear{c.bias, c.scale, c.divisor, float(c.multiplier)};
  const BatchNormAffine norm{c.gamma, c.beta, c.eps};
  const auto s = static_cast<cudaStream_t>(stream);
  return int(small::with_kind(int(p.dtype), p.ieee != 0, [&](auto kind) {
    using Kind = decltype(kind);
    if (c.training) {
      const small::TrainEpilogue<Kind::kFast> epilogue{linear,         norm,       c.running_mean, c.running_var,
                                                            c.multiplier, c.momentum, c.batches};
      return small::launch_all_rows<Kind>(small::operands(p, x, out), epilogue, props->sm_count, s);
    }
    const small::EvalEpilogue<Kind::kFast> epilogue{{linear, norm, c.running_mean, c.running_var}};
    return small::launch_any<Kind>(small::operands(p, x, out), epilogue, props->sm_count, s);
  }));
}

// The first of these as one product of Hopper's GEMM; cudaErrorNotSupported on another device.
FXFUSE_API int fxfuse_large_linear_activation_scale(const void* call, const void* x, void* out, void* stream) {
  const auto& c = *static_cast<const small::ActivationCall*>(call);
  const auto& p = c.product;
  return fxfuse_linear_activation_scale_forward(x, p.weight, c.bias.data, out, p.m, p.n, p.k, p.pitch_x, p.pitch_w,
                                                int(c.activation), c.alpha, c.beta, c.pre_scale, c.scale, int(p.ieee),
                                                int(p.dtype), int(p.device), stream);
}

// The second, in evaluation.
FXFUSE_API int fxfuse_large_linear_scale_batchnorm1d(const void* call, const void* x, void* out, void* stream) {
  const auto& c = *static_cast<const small::BatchNormCall*>(call);
  const auto& p = c.product;
  if (c.training) return int(cudaErrorInvalidValue);
  return fxfuse_linear_scale_batchnorm1d_eval(
      x, p.weight, out, p.m, p.n, p.k, p.pitch_x, p.pitch_w, c.bias.data, int(c.bias.code), c.scale.data, int(c.scale.code),
      c.divisor.data, int(c.divisor.code), float(c.multiplier), c.gamma.data, int(c.gamma.code), c.beta.data,
      int(c.beta.code), c.eps, c.running_mean.data, int(c.running_mean.code), c.running_var.data, int(c.running_var.code),
      int(p.ieee), int(p.dtype), int(p.out_dtype), int(p.device), stream);
}

// The second, in training. scratch: floats, 2 ceil(m / 64) n of partials, 2 n of maps and 3 n of saved statistics; counters
// as fxfuse_linear_scale_batchnorm1d_train has them.
FXFUSE_API int fxfuse_large_linear_scale_batchnorm1d_train(const void* call, const void* x, void* out, void* scratch,
                                                           void* counters, void* stream) {
  const auto& c = *static_cast<const small::BatchNormCall*>(call);
  const auto& p = c.product;
  if (!c.training || p.out_dtype != p.dtype) return int(cudaErrorInvalidValue);
  float* const partials = static_cast<float*>(scratch);
  float* const maps = partials + 2 * ceil_div<int64_t>(p.m, 64) * p.n;
  return fxfuse_linear_scale_batchnorm1d_train(
      x, p.weight, out, nullptr, partials, maps, counters, maps + 2 * p.n, c.batches, p.m, p.n, p.k, p.pitch_x, p.pitch_w,
      c.bias.data, int(c.bias.code), c.scale.data, int(c.scale.code), c.divisor.data, int(c.divisor.code),
      float(c.multiplier), c.gamma.data, int(c.gamma.code), c.beta.data, int(c.beta.code), c.eps, c.running_mean.data,
      int(c.running_mean.code), c.running_var.data, int(c.running_var.code), float(c.momentum), int(p.ieee), int(p.dtype),
      int(p.device), stream);
}

// out[m, n] = scale * act(pre_scale * z): the pass behind a library's product z, which may be out.
FXFUSE_API int fxfuse_after_linear_activation_scale(const void* call, const void* z, void* out, void* stream) {
  const auto& c = *static_cast<const small::ActivationCall*>(call);
  return fxfuse_linear_activation_scale_apply(z, out, c.product.m * c.product.n, int(c.activation), c.alpha, c.beta,
                                              c.pre_scale, c.scale, int(c.product.dtype), int(c.product.device), stream);
}

// The same for linear_scale_batchnorm1d, on acc[m, n] = x W^T. In training scratch is saved[3, n], and where c.block_rows is
// not 0, maps[3, n] and partials of so many rows behind it: statistics and normalisation are then launches of their own. A
// launch more counts the batch.
FXFUSE_API int fxfuse_after_linear_scale_batchnorm1d(const void* call, const void* acc, void* out, void* scratch,
                                                     void* stream) {
  const auto& c = *static_cast<const small::BatchNormCall*>(call);
  const auto& p = c.product;
  const int device = int(p.device), dtype = int(p.dtype), out_dtype = int(p.out_dtype);
  if (!c.training)
    return fxfuse_linear_scale_batchnorm1d_eval_apply(
        acc, out, p.m, p.n, c.bias.data, int(c.bias.code), c.scale.data, int(c.scale.code), c.divisor.data,
        int(c.divisor.code), float(c.multiplier), c.gamma.data, int(c.gamma.code), c.beta.data, int(c.beta.code), c.eps,
        c.running_mean.data, int(c.running_mean.code), c.running_var.data, int(c.running_var.code), dtype, out_dtype,
        device, stream);
  float* const saved = static_cast<float*>(scratch);
  float* const maps = c.block_rows != 0 ? saved + 3 * p.n : nullptr;
  void* const partials = c.block_rows != 0 ? maps + 3 * p.n : nullptr;
  if (partials != nullptr)
    if (const int error = fxfuse_linear_scale_batchnorm1d_statistics(acc, partials, p.m, p.n, dtype, device, stream))
      return error;
  const int error = fxfuse_linear_scale_batchnorm1d_train_apply(
      acc, out, partials, c.block_rows, maps, saved, p.m, p.n, c.bias.data, int(c.bias.code), c.scale.data, int(c.scale.code),
      c.divisor.data, int(c.divisor.code), float(c.multiplier), c.gamma.data, int(c.gamma.code), c.beta.data, int(c.beta.code),
      c.eps, c.running_mean.data, int(c.running_mean.code), c.running_var.data, int(c.running_var.code),
      float(c.momentum), dtype, out_dtype, device, stream);
  if (error != 0 || c.batches == nullptr) return error;
  FXFUSE_ON_DEVICE(device, props);
  small::count_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(c.batches);
  FXFUSE_CHECK_LAUNCH();
  return 0;
}
