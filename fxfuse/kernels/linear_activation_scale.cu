// out = scale * act(pre_scale * (x W^T + b)): in the GEMM's epilogue on Hopper; elsewhere the library's GEMM, then one pass.
#include "activation.cuh"
#include "activation_backward.cuh"
#include "column_vector.cuh"
#include "hopper/activation_gemm.cuh"
#include "passes.cuh"

namespace fxfuse {
namespace {

constexpr int kPassThreads = 256;

// One element or vector per step of a grid-stride loop; `body(i, vector)` reads and writes 16 bytes of the narrowest type.
template <typename T, typename Op>
__global__ void __launch_bounds__(kPassThreads) map1_kernel(const T* in, T* out, int64_t count, Op op) {
  const int64_t vectors = count / Pack<T>::N;
  const int64_t step = int64_t(gridDim.x) * kPassThreads;
  const int64_t first = int64_t(blockIdx.x) * kPassThreads + threadIdx.x;
  for (int64_t i = first; i < vectors; i += step) {
    const Pack<T> x = ld_keep(in + i * Pack<T>::N);
    Pack<T> y;
#pragma unroll
    for (int j = 0; j < Pack<T>::N; ++j) y.set(j, op(x.get(j)));
    st_keep(out + i * Pack<T>::N, y);
  }
  for (int64_t i = vectors * Pack<T>::N + first; i < count; i += step) st_one(out + i, op(ld_one(in + i)));
}

template <typename T, typename Op>
__global__ void __launch_bounds__(kPassThreads) map2_kernel(const T* a, const T* b, T* out, int64_t count, Op op) {
  const int64_t vectors = count / Pack<T>::N;
  const int64_t step = int64_t(gridDim.x) * kPassThreads;
  const int64_t first = int64_t(blockIdx.x) * kPassThreads + threadIdx.x;
  for (int64_t i = first; i < vectors; i += step) {
    const Pack<T> x = ld_keep(a + i * Pack<T>::N), z = ld_keep(b + i * Pack<T>::N);
    Pack<T> y;
#pragma unroll
    for (int j = 0; j < Pack<T>::N; ++j) y.set(j, op(x.get(j), z.get(j)));
    st_keep(out + i * Pack<T>::N, y);
  }
  for (int64_t i = vectors * Pack<T>::N + first; i < count; i += step) st_one(out + i, op(ld_one(a + i), ld_one(b + i)));
}

template <typename Act>
struct ForwardPass {
  Act act;
  float pre_scale, scale;
  __device__ __forceinline__ float operator()(float z) const { return scale * act.value(pre_scale * z); }
};

template <typename Act>
struct BackwardPass {  // from z = x W^T + b
  Act act;
  float pre_scale, scale;
  __device__ __forceinline__ float operator()(float dy, float z) const {
    return dy * (scale * pre_scale) * act.slope(pre_scale * z);
  }
};

template <typename Act>
struct BackwardFromOutputPass {
  Act act;
  float pre_scale, scale, inverse_scale;
  __device__ __forceinline__ float operator()(float dy, float out) const {
    return dy * (scale * pre_scale) * act.slope_from_value(out * inverse_scale);
  }
};

int pass_blocks(int64_t count, const DeviceProps& props) {
  const int64_t wanted = ceil_div<int64_t>(ceil_div<int64_t>(count, 8), kPassThreads);
  const int64_t most = int64_t(props.sm_count) * 32;
  return int(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace
}  // namespace fxfuse

using namespace fxfuse;

// z, out: `count` contiguous elements, 16-byte aligned; out may be z. out = scale * act(pre_scale * z).
FXFUSE_API int fxfuse_linear_activation_scale_apply(const void* z, void* out, int64_t count, int activation, float alpha,
                                                    float beta, float pre_scale, float scale, int dtype, int device,
                                                    void* stream) {
  if (count == 0) return 0;
  FXFUSE_ON_DEVICE(device, props);
  const auto s = static_cast<cudaStream_t>(stream);
  FXFUSE_DISPATCH(dtype, T, {
    const bool known = with_activation<sizeof(T) == 2>(activation, alpha, beta, [&](auto act) {
      using Act = decltype(act);
      map1_kernel<<<pass_blocks(count, *props), kPassThreads, 0, s>>>(
          static_cast<const T*>(z), static_cast<T*>(out), count, ForwardPass<Act>{act, pre_scale, scale});
    });
    if (!known) return int(cudaErrorInvalidValue);
  });
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

// Bytes of float scratch for the sums of db below (0: none), and ints of counters.
FXFUSE_API int fxfuse_linear_activation_scale_backward_scratch(int64_t rows, int64_t columns, int dtype, int device,
                                                               int64_t* floats, int64_t* counters) {
  FXFUSE_ON_DEVICE(device, props);
  FXFUSE_DISPATCH(dtype, T, {
    const int blocks = column_blocks<T>(rows, columns, *props);
    *floats = blocks > 1 ? blocks * columns : 0;
    *counters = blocks > 1 ? ceil_div<int64_t>(columns, kStripe<T>) : 0;
  });
  return 0;
}

// dz[rows, columns] = dy * d out / d z. `saved` is z, or out where from_output (see slope_from_value; dz is 0 for scale = 0).
// Contiguous, 16-byte aligned; dz may be dy or saved. db: null, or where columns are whole packs of 16 bytes the sums of
// dz's columns, with scratch and counters as above (counters are zero and left so).
FXFUSE_API int fxfuse_linear_activation_scale_backward(const void* dy, const void* saved, void* dz, void* db, void* scratch,
                                                       void* counters, int64_t rows, int64_t columns, int from_output,
                                                       int activation, float alpha, float beta, float pre_scale, float scale,
                                                       int dtype, int device, void* stream) {
  const int64_t count = rows * columns;
  if (count == 0) return 0;
  FXFUSE_ON_DEVICE(device, props);
  const auto s = static_cast<cudaStream_t>(stream);
  const float inverse = scale == 0.f ? 0.f : 1.f / scale;
  FXFUSE_DISPATCH(dtype, T, {
    if (db != nullptr && columns % Pack<T>::N != 0) return int(cudaErrorInvalidValue);
    const T* g = static_cast<const T*>(dy);
    const T* v = static_cast<const T*>(saved);
    T* d = static_cast<T*>(dz);
    const auto go = [&](const auto& op) {
      if (db == nullptr) {
        map2_kernel<<<pass_blocks(count, *props), kPassThreads, 0, s>>>(g, v, d, count, op);
        return;
      }
      const int blocks = column_blocks<T>(rows, columns, *props);
      const dim3 grid(unsigned(ceil_div<int64_t>(columns, kStripe<T>)), unsigned(blocks));
      map2_columns_kernel<<<grid, kColumnsThreads, 0, s>>>(g, v, d, static_cast<T*>(db), static_cast<float*>(scratch),
                                                           static_cast<int*>(counters), rows, columns,
                                                           int(ceil_div<int64_t>(rows, blocks)), op);
    };
    const bool known = with_activation<sizeof(T) == 2>(activation, alpha, beta, [&](auto act) {
      using Act = decltype(act);
      if (from_output) go(BackwardFromOutputPass<Act>{act, pre_scale, scale, inverse});
      else go(BackwardPass<Act>{act, pre_scale, scale});
    });
    if (!known) return int(cudaErrorInvalidValue);
  });
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

// The whole op on Hopper: x[m, k], weight[n, k] with rows pitch_x, pitch_w elements apart, bias null or n elements of the
// same dtype, out[m, n] contiguous. dtype float32 multiplies in TF32, or where ieee in float32. Bases and pitches in multiples of 16 bytes, out too.
FXFUSE_API int fxfuse_linear_activation_scale_forward(const void* x, const void* weight, const void* bias, void* out,
                                                      int64_t m, int64_t n, int64_t k, int64_t pitch_x, int64_t pitch_w,
                                                      int activation, float alpha, float beta, float pre_scale, float scale,
                                                      int ieee, int dtype, int device, void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  if (!is_hopper(*props)) return int(cudaErrorNotSupported);
  const hopper::Operands operands{x, weight, out, m, n, k, pitch_x, pitch_w, n};
  const hopper::ActivationEpilogue::Params params{{bias, dtype}, activation, alpha, beta, pre_scale, scale};
  return int(hopper::activation_gemm(operands, params, ieee, dtype, device, props->sm_count,
                                     static_cast<cudaStream_t>(stream)));
}
