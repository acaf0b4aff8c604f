// Linear, per-channel scale and BatchNorm: the C interface. See batchnorm_columns.cuh for the mathematics.
#include "batchnorm_backward.cuh"
#include "batchnorm_backward_once.cuh"
#include "batchnorm_forward.cuh"
#include "hopper/batchnorm_gemm.cuh"
#include "passes.cuh"
#include "pdl.cuh"

#include <type_traits>

using namespace fxfuse;

namespace {

constexpr int kPassRows = 64;  // of a block in the passes without reduction
constexpr int kStatisticsRows = 128;
constexpr int kMostPartials = 1024;
constexpr int64_t kSmallRows = 1024;  // what train_columns_kernel takes

// Rows of a block of the reducing passes; the caller asks for ceil(rows / this) partials through the function below.
int64_t reduction_rows(int64_t rows) {
  const int64_t least = ceil_div<int64_t>(rows, kMostPartials);
  return least < kStatisticsRows ? kStatisticsRows : least;
}

template <int V>
dim3 grid(int64_t rows, int64_t columns, int64_t block_rows) {
  return dim3(unsigned(ceil_div<int64_t>(columns, kWarp * V)), unsigned(ceil_div(rows, block_rows)));
}
int64_t pass_rows(int64_t rows) {  // grid.y stays under 65536
  const int64_t least = ceil_div<int64_t>(rows, 65535);
  return least < kPassRows ? kPassRows : least;
}

// Runs `body` with V = 16 bytes of T where rows of `columns` elements and all bases allow, else 1.
template <typename T, typename Body>
void with_width(int64_t columns, bool aligned, Body&& body) {
  constexpr int kWide = 16 / int(sizeof(T));
  if (aligned && columns % kWide == 0) body(std::integral_constant<int, kWide>{});
  else body(std::integral_constant<int, 1>{});
}

// Runs `body` with the product's and the result's type: equal, or a 16-bit product and a float32 result.
#define FXFUSE_DISPATCH_PAIR(code, other, T, Other, ...)                                          \
  if ((code) == (other)) {                                                                        \
    FXFUSE_DISPATCH(code, T, { using Other = T; __VA_ARGS__; })                                   \
  } else if ((other) == kFloat32 && (code) == kFloat16) {                                         \
    using T = __half; using Other = float; __VA_ARGS__;                                           \
  } else if ((other) == kFloat32 && (code) == kBFloat16) {                                        \
    using T = __nv_bfloat16; using Other = float; __VA_ARGS__;                                    \
  } else {                                                                                        \
    return int(cudaErrorInvalidValue);                                                            \
  }

// The arguments that describe the op, in the order of every function that takes them.
#define FXFUSE_LINEAR_SCALE                                                                                       \
  const void *bias, int bias_code, const void *scale, int scale_code, const void *divisor, int divisor_code, float multiplier
#define FXFUSE_BATCHNORM const void *gamma, int gamma_code, const void *beta, int beta_code, float eps
#define FXFUSE_LINEAR_SCALE_VALUE LinearScale{{bias, bias_code}, {scale, scale_code}, {divisor, divisor_code}, multiplier}
#define FXFUSE_BATCHNORM_VALUE BatchNormAffine{{gamma, gamma_code}, {beta, beta_code}, eps}

// The steps of backward_once_kernel; 0 where the passes must do.
int backward_steps(const DeviceProps& props, int64_t rows, int64_t columns, bool aligned, int dtype, int out_dtype) {
  const int bytes = dtype == kFloat32 ? 4 : 2;
  if (!aligned || columns * bytes % 16 != 0) return 0;
  const int steps = once_steps(rows, dtype == out_dtype ? 1 : 2);
  return once_bytes(steps) + 10240 <= props.smem_per_block ? steps : 0;
}

template <typename Dy, typename T, int HELD>
int backward_once(const DeviceProps& props, const Dy* dy, const T* acc, const BackwardState& state, T* d_acc,
                  cudaStream_t stream) {
  constexpr auto kKernel = backward_once_kernel<Dy, T, HELD>;
  constexpr int kColumns = kOnceLanes * Pack<T>::N;
  FXFUSE_CHECK(prepare_shared_memory<kKernel>(once_bytes(HELD)));
  FXFUSE_CHECK(launch(props, false, kKernel, unsigned(ceil_div<int64_t>(state.columns, kColumns)), kOnceThreads,
                      once_bytes(HELD), stream, dy, acc, state, d_acc));
  return 0;
}

// A GEMM of dtype T; `ieee`: float32 products are float32, not TF32, and their epilogue is Exact.
template <typename Epilogue, typename T, typename Out, typename Exact = Epilogue>
cudaError_t product(const hopper::Operands& operands, const typename Epilogue::Params& params, int ieee, int device,
                    int sm_count, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if constexpr (std::is_same_v<T, float>)
    if (ieee) return hopper::float32_gemm<Exact>(operands, params, device, sm_count, s);
  return hopper::gemm<Epilogue, T, Out>(operands, params, device, sm_count, s);
}

}  // namespace

// --- on Hopper --------------------------------------------------------------------------------------------------------------
// x[m, k], weight[n, k]: rows pitch_x, pitch_w elements apart; bases and pitches in multiples of 16 bytes, and so n elements
// of the result. float32 multiplies in TF32, or where ieee in float32.

// out[m, n] = the whole op in evaluation. out_dtype: dtype, or float32.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_eval(const void* x, const void* weight, void* out, int64_t m, int64_t n,
                                                    int64_t k, int64_t pitch_x, int64_t pitch_w, FXFUSE_LINEAR_SCALE,
                                                    FXFUSE_BATCHNORM, const void* running_mean, int mean_code,
                                                    const void* running_var, int var_code, int ieee, int dtype,
                                                    int out_dtype, int device, void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  if (!is_hopper(*props)) return int(cudaErrorNotSupported);
  const EvalColumns columns{FXFUSE_LINEAR_SCALE_VALUE, FXFUSE_BATCHNORM_VALUE, {running_mean, mean_code},
                            {running_var, var_code}};
  const hopper::Operands operands{x, weight, out, m, n, k, pitch_x, pitch_w, n};
  FXFUSE_DISPATCH_PAIR(dtype, out_dtype, T, Out, {
    FXFUSE_CHECK((product<hopper::BatchNormEvalEpilogue<false>, T, Out, hopper::BatchNormEvalEpilogue<true>>(
        operands, columns, ieee, device, props->sm_count, stream)));
  })
  return 0;
}

// acc[m, n] = x weight^T, and partials[ceil(m / 64), n] = (mean, M2) of each column of acc before it is rounded.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_product(const void* x, const void* weight, void* acc, void* partials,
                                                       int64_t m, int64_t n, int64_t k, int64_t pitch_x, int64_t pitch_w,
                                                       int ieee, int dtype, int device, void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  if (!is_hopper(*props)) return int(cudaErrorNotSupported);
  const hopper::Operands operands{x, weight, acc, m, n, k, pitch_x, pitch_w, n};
  const hopper::StatisticsEpilogue::Params params{static_cast<float2*>(partials)};
  FXFUSE_DISPATCH(dtype, T, {
    FXFUSE_CHECK((product<hopper::StatisticsEpilogue, T, T>(operands, params, ieee, device, props->sm_count, stream)));
  })
  return 0;
}

// Training in one kernel: out[m, n] normalised, running statistics updated, saved[3, n] written, *batches (int64) one more
// where not null, and where acc is not null acc[m, n] = x weight^T. With ieee for at most 1024 rows. partials[ceil(m / 64), n]
// and maps[n], float pairs, are scratch; counters[1 + 2 ceil(n / 64)] ints are zero and left so, by the last of the stream's
// launches that uses them.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_train(const void* x, const void* weight, void* out, void* acc, void* partials,
                                                     void* maps, void* counters, void* saved, void* batches, int64_t m,
                                                     int64_t n, int64_t k, int64_t pitch_x, int64_t pitch_w,
                                                     FXFUSE_LINEAR_SCALE, FXFUSE_BATCHNORM, void* running_mean,
                                                     int mean_code, void* running_var, int var_code, float momentum,
                                                     int ieee, int dtype, int device, void* stream) {
  if (m > kSmallRows && ieee && dtype == kFloat32) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(device, props);
  if (!is_hopper(*props)) return int(cudaErrorNotSupported);
  const auto s = static_cast<cudaStream_t>(stream);
  const TrainState state{FXFUSE_LINEAR_SCALE_VALUE, FXFUSE_BATCHNORM_VALUE, {running_mean, mean_code},
                         {running_var, var_code}, momentum, static_cast<float*>(saved), n, static_cast<int64_t*>(batches)};
  const hopper::Operands operands{x, weight, out, m, n, k, pitch_x, pitch_w, n, acc};
  const auto run = [&](auto epilogue, auto type) {
    using Epilogue = decltype(epilogue);
    using T = decltype(type);
    return product<Epilogue, T, T>(
        operands, {state, static_cast<float2*>(partials), static_cast<float2*>(maps), {static_cast<int*>(counters)}}, ieee, device,
        props->sm_count, s);
  };
  FXFUSE_DISPATCH(dtype, T, {
    FXFUSE_CHECK(acc == nullptr ? run(hopper::BatchNormTrainEpilogue<false>{}, T{})
                                : run(hopper::BatchNormTrainEpilogue<true>{}, T{}));
  });
  return 0;
}

// --- anywhere -----------------------------------------------------------------------------------------------------------------
// acc, out, dy, d_acc: contiguous [rows, columns].

// Evaluation on a finished product. out may be acc.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_eval_apply(const void* acc, void* out, int64_t rows, int64_t columns,
                                                          FXFUSE_LINEAR_SCALE, FXFUSE_BATCHNORM, const void* running_mean,
                                                          int mean_code, const void* running_var, int var_code, int dtype,
                                                          int out_dtype, int device, void* stream) {
  if (rows == 0 || columns == 0) return 0;
  FXFUSE_ON_DEVICE(device, props);
  const EvalColumns maps{FXFUSE_LINEAR_SCALE_VALUE, FXFUSE_BATCHNORM_VALUE, {running_mean, mean_code},
                         {running_var, var_code}};
  const int64_t block_rows = pass_rows(rows);
  FXFUSE_DISPATCH_PAIR(dtype, out_dtype, T, Out, {
    with_width<T>(columns, aligned16(acc) && aligned16(out), [&](auto v) {
      constexpr int V = decltype(v)::value;
      normalise_kernel<T, Out, V><<<grid<V>(rows, columns, block_rows), kPassThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(acc), static_cast<Out*>(out), maps, rows, columns, block_rows);
    });
  })
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

// Rows that one partial of the reducing passes stands for: they write ceil(rows / this) x columns float pairs.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_block_rows(int64_t rows, int64_t* block_rows) {
  *block_rows = reduction_rows(rows);
  return 0;
}

// partials[ceil(rows / block_rows), columns] = (mean, M2) of acc's columns.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_statistics(const void* acc, void* partials, int64_t rows, int64_t columns,
                                                          int dtype, int device, void* stream) {
  if (rows == 0 || columns == 0) return 0;
  FXFUSE_ON_DEVICE(device, props);
  const int64_t block_rows = reduction_rows(rows);
  FXFUSE_DISPATCH(dtype, T, {
    with_width<T>(columns, aligned16(acc), [&](auto v) {
      constexpr int V = decltype(v)::value;
      column_statistics_kernel<T, V><<<grid<V>(rows, columns, block_rows), kPassThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(acc), static_cast<float2*>(partials), rows, columns, block_rows);
    });
  })
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

// Training on a finished product: running statistics updated, saved[3, columns] written, out normalised; out may be acc.
// partials of `block_rows` rows each (64 after _product, _block_rows after _statistics); maps[3, columns] is scratch.
// partials null: all in one launch from acc alone, for up to 1024 rows; maps is not used.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_train_apply(const void* acc, void* out, const void* partials,
                                                           int64_t block_rows, void* maps, void* saved, int64_t rows,
                                                           int64_t columns, FXFUSE_LINEAR_SCALE, FXFUSE_BATCHNORM,
                                                           void* running_mean, int mean_code, void* running_var,
                                                           int var_code, float momentum, int dtype, int out_dtype,
                                                           int device, void* stream) {
  if (rows == 0 || columns == 0) return 0;
  if (partials == nullptr && rows > kSmallRows) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(device, props);
  const auto s = static_cast<cudaStream_t>(stream);
  const TrainState state{FXFUSE_LINEAR_SCALE_VALUE, FXFUSE_BATCHNORM_VALUE, {running_mean, mean_code},
                         {running_var, var_code}, momentum, static_cast<float*>(saved), columns};
  const bool aligned = aligned16(acc) && aligned16(out);
  if (partials != nullptr) {
    finish_columns_kernel<32><<<unsigned(ceil_div<int64_t>(columns, kWarp)), 32 * kWarp, 0, s>>>(
        static_cast<const float2*>(partials), state, static_cast<float*>(maps), rows, block_rows);
    FXFUSE_CHECK_LAUNCH();
  }
  const int64_t step = pass_rows(rows);
  FXFUSE_DISPATCH_PAIR(dtype, out_dtype, T, Out, {
    with_width<T>(columns, aligned, [&](auto v) {
      constexpr int V = decltype(v)::value;
      const T* in = static_cast<const T*>(acc);
      Out* to = static_cast<Out*>(out);
      if (partials != nullptr) {
        normalise_kernel<T, Out, V><<<grid<V>(rows, columns, step), kPassThreads, 0, s>>>(
            in, to, TrainColumns{static_cast<const float*>(maps), columns}, rows, columns, step);
        return;
      }
      constexpr int kLanes = V == 1 ? 16 : 4, kMore = V == 1 ? 4 : 1;
      const unsigned blocks = unsigned(ceil_div<int64_t>(columns, kLanes * V));
      const int64_t each = ceil_div<int64_t>(rows, kPassThreads / kLanes);
      if (each <= 1 * kMore) train_columns_kernel<T, Out, V, kLanes, 1 * kMore><<<blocks, kPassThreads, 0, s>>>(in, to, state, rows);
      else if (each <= 4 * kMore) train_columns_kernel<T, Out, V, kLanes, 4 * kMore><<<blocks, kPassThreads, 0, s>>>(in, to, state, rows);
      else train_columns_kernel<T, Out, V, kLanes, 16 * kMore><<<blocks, kPassThreads, 0, s>>>(in, to, state, rows);
    });
  })
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

// Float pairs of scratch that _backward needs; 0 where it is one launch. aligned: dy, acc and d_acc on 16 bytes.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_backward_scratch(int64_t rows, int64_t columns, int aligned, int dtype,
                                                                int out_dtype, int device, int64_t* pairs) {
  FXFUSE_ON_DEVICE(device, props);
  const bool once = backward_steps(*props, rows, columns, aligned != 0, dtype, out_dtype) != 0;
  *pairs = once ? 0 : ceil_div(rows, reduction_rows(rows)) * columns + ceil_div<int64_t>(3 * columns, 2);
  return 0;
}

// Backward in training: d_acc (may be dy or acc, where the dtypes agree) and, where not null, d_gamma, d_beta, d_bias (zeros)
// and d_scale (of one scale a column) in the dtypes of gamma, beta, bias and scale, and d_s[columns] (float32, by the whole
// factor s). scratch: as many float pairs as _backward_scratch says. dy has out's dtype, acc and d_acc the product's.
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_backward(const void* dy, const void* acc, const void* saved, void* d_acc,
                                                        void* scratch, void* d_gamma, void* d_beta, void* d_bias,
                                                        void* d_s, void* d_scale, int64_t rows, int64_t columns,
                                                        FXFUSE_LINEAR_SCALE, FXFUSE_BATCHNORM, int dtype, int out_dtype,
                                                        int device, void* stream) {
  if (rows == 0 || columns == 0) return 0;
  FXFUSE_ON_DEVICE(device, props);
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t block_rows = reduction_rows(rows), step = pass_rows(rows), blocks = ceil_div(rows, block_rows);
  const bool aligned = aligned16(dy) && aligned16(acc) && aligned16(d_acc);
  const int steps = scratch == nullptr ? backward_steps(*props, rows, columns, aligned, dtype, out_dtype) : 0;
  if (scratch == nullptr && steps == 0) return int(cudaErrorInvalidValue);
  const float* kept = static_cast<const float*>(saved);
  float2* const partials = static_cast<float2*>(scratch);
  float* const maps = reinterpret_cast<float*>(partials + blocks * columns);
  const BackwardState state{FXFUSE_LINEAR_SCALE_VALUE, FXFUSE_BATCHNORM_VALUE, kept, {d_gamma, gamma_code},
                            {d_beta, beta_code}, {d_bias, bias_code}, {d_s, kFloat32}, {d_scale, scale_code}, rows, columns};
  FXFUSE_DISPATCH_PAIR(dtype, out_dtype, T, Dy, {
    const Dy* g = static_cast<const Dy*>(dy);
    const T* a = static_cast<const T*>(acc);
    T* d = static_cast<T*>(d_acc);
    if (steps == 4) return backward_once<Dy, T, 4>(*props, g, a, state, d, s);
    if (steps == 8) return backward_once<Dy, T, 8>(*props, g, a, state, d, s);
    if constexpr (sizeof(Dy) == sizeof(T))
      if (steps == 16) return backward_once<Dy, T, 16>(*props, g, a, state, d, s);
    with_width<T>(columns, aligned, [&](auto v) {
      constexpr int V = decltype(v)::value;
      backward_sums_kernel<Dy, T, V>
          <<<grid<V>(rows, columns, block_rows), kPassThreads, 0, s>>>(g, a, kept, partials, rows, columns, block_rows);
      finish_backward_kernel<32><<<unsigned(ceil_div<int64_t>(columns, kWarp)), 32 * kWarp, 0, s>>>(
          partials, state, maps, int(blocks));
      backward_apply_kernel<Dy, T, V>
          <<<grid<V>(rows, columns, step), kPassThreads, 0, s>>>(g, a, kept, maps, d, rows, columns, step);
    });
  })
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

// --- a training step of one kind -------------------------------------------------------------------------------------------
// The same calls for steps like one before: two structures instead of some forty arguments, which a caller in Python turns
// into C's one by one. kernels/batchnorm_step.py packs them.

struct StepKind {
  int64_t m, n, k, pitch_x, pitch_w;
  int bias, scale, gamma, beta, mean, var;  // codes of the vectors
  int ieee, dtype, out_dtype, device;
};

struct StepForward {
  const void *x, *weight;
  void *out, *acc, *partials, *maps, *counters, *saved, *batches;
  const void *bias, *scale, *gamma, *beta;
  void *mean, *var, *stream;
  double multiplier, eps, momentum;
};

struct StepBackward {
  const void *dy, *acc, *saved;
  void *d_acc, *scratch, *d_gamma, *d_beta, *d_bias, *d_scale;
  const void *bias, *scale, *gamma, *beta;
  void* stream;
  double multiplier, eps;
};

FXFUSE_API int fxfuse_linear_scale_batchnorm1d_step_forward(const StepKind* kind, const StepForward* step) {
  const StepKind& k = *kind;
  const StepForward& s = *step;
  return fxfuse_linear_scale_batchnorm1d_train(
      s.x, s.weight, s.out, s.acc, s.partials, s.maps, s.counters, s.saved, s.batches, k.m, k.n, k.k, k.pitch_x, k.pitch_w,
      s.bias, k.bias, s.scale, k.scale, nullptr, 0, float(s.multiplier), s.gamma, k.gamma, s.beta, k.beta, float(s.eps),
      s.mean, k.mean, s.var, k.var, float(s.momentum), k.ieee, k.dtype, k.device, s.stream);
}

FXFUSE_API int fxfuse_linear_scale_batchnorm1d_step_backward(const StepKind* kind, const StepBackward* step) {
  const StepKind& k = *kind;
  const StepBackward& s = *step;
  return fxfuse_linear_scale_batchnorm1d_backward(
      s.dy, s.acc, s.saved, s.d_acc, s.scratch, s.d_gamma, s.d_beta, s.d_bias, nullptr, s.d_scale, k.m, k.n, s.bias, k.bias,
      s.scale, k.scale, nullptr, 0, float(s.multiplier), s.gamma, k.gamma, s.beta, k.beta, float(s.eps), k.dtype, k.out_dtype,
      k.device, s.stream);
}
