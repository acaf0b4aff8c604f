// Pointwise KL divergence: forward with or without a reduction, gradients in the same pass or in one of their own.
//
// In a sum every thread loads a few packs of 16 bytes from each input before it uses the first, works in float, and leaves
// the running sum in double once per round. Blocks write one partial sum each; a second kernel of one block adds them in a
// fixed order. What has no sum is kl_div_elements.cuh's. Meaning, NaN and inf follow torch.nn.functional.kl_div and its
// derivatives:
//   log_target = false   loss = xlogy(t, t) - t * lp
//   log_target = true    loss = exp(t) * (t - lp)          with lp = input, or log(input) where LOG_INPUT
// Written out with library logarithms that is 59 instructions an element, as many as an H200 can issue while it reads
// the two floats. A scalar loss of plain probabilities therefore takes a shorter road (kl_div_fast.cuh) a pack at a
// time, and comes back to the long one for any pack that holds a negative, infinite, NaN or vanishing number.
#include "finish.cuh"
#include "kl_div_elements.cuh"
#include "kl_div_ring.cuh"

namespace {

using namespace fxfuse;
using Mode = KlDivMode;

constexpr int kThreads = 256;

// Packs of each input that a thread has in flight. Passes that also write need fewer, and the registers for more warps.
template <Mode MODE> constexpr int kUnroll = MODE == Mode::kReduce ? 4 : 2;
template <Mode MODE> constexpr int kBlocksPerSm = MODE == Mode::kReduce ? 5 : 3;

// UNROLL packs of a chunk that starts at p. Unaligned data is read one element at a time with neighbouring threads on
// neighbouring elements; the order inside a chunk then differs, alike for every tensor.
template <typename T, int UNROLL>
__device__ __forceinline__ void load_chunk(Pack<T> (&v)[UNROLL], const T* p, bool aligned) {
  constexpr int N = Pack<T>::N;
  if (aligned) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) v[u] = ld_stream(p + (u * kThreads + threadIdx.x) * N);
  } else {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) v[u].at[i] = p[(u * N + i) * kThreads + threadIdx.x];
  }
}

template <typename T, int UNROLL>
__device__ __forceinline__ void store_chunk(T* p, const Pack<T> (&v)[UNROLL], bool aligned) {
  constexpr int N = Pack<T>::N;
  if (aligned) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) st_stream(p + (u * kThreads + threadIdx.x) * N, v[u]);
  } else {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) p[(u * N + i) * kThreads + threadIdx.x] = v[u].at[i];
  }
}

// MODE: kReduce or kReduceGrads.
template <typename T, bool LOG_TARGET, bool LOG_INPUT, Mode MODE>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<MODE>) kl_div_kernel(KlDivArgs a) {
  constexpr int N = Pack<T>::N;
  constexpr int64_t kChunk = int64_t(kThreads) * kUnroll<MODE> * N;
  // Gradients take as many instructions as a load takes time: the next round's loads are on their way meanwhile.
  constexpr bool kGrads = MODE == Mode::kReduceGrads, kAhead = kGrads;
  const T* const input = static_cast<const T*>(a.input);
  const T* const target = static_cast<const T*>(a.target);
  T* const grad_input = static_cast<T*>(a.grad_input);
  T* const grad_target = static_cast<T*>(a.grad_target);
  const float g = kGrads ? range_as<T>(a.factor) : 1.f;

  double sum = 0;
  const int64_t chunks = a.n / kChunk;
  [[maybe_unused]] Pack<T> next_x[kUnroll<MODE>], next_t[kUnroll<MODE>];
  if constexpr (kAhead) {
    if (blockIdx.x < chunks) {
      load_chunk(next_x, input + blockIdx.x * kChunk, a.aligned);
      load_chunk(next_t, target + blockIdx.x * kChunk, a.aligned);
    }
  }
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const int64_t at = c * kChunk;
    Pack<T> x[kUnroll<MODE>], t[kUnroll<MODE>];
    if constexpr (kAhead) {
#pragma unroll
      for (int u = 0; u < kUnroll<MODE>; ++u) {
        x[u] = next_x[u];
        t[u] = next_t[u];
      }
      if (c + gridDim.x < chunks) {
        load_chunk(next_x, input + at + gridDim.x * kChunk, a.aligned);
        load_chunk(next_t, target + at + gridDim.x * kChunk, a.aligned);
      }
    } else {
      load_chunk(x, input + at, a.aligned);
      load_chunk(t, target + at, a.aligned);
    }
    float part = 0;
#pragma unroll
    for (int u = 0; u < kUnroll<MODE>; ++u) {
      if constexpr (!LOG_TARGET) {
        float loss;
        Pack<T> gi;
        const bool fast = grad_target == nullptr && kl_div_fast<T, LOG_INPUT, kGrads>(x[u], t[u], g, loss, gi);
        if (fast) {
          if constexpr (kGrads) x[u] = gi;
        } else if constexpr (kGrads) {
          loss = long_road_grads<T, LOG_INPUT>(x[u], t[u], g);
        } else {
          loss = long_road<T, LOG_INPUT>(x[u].raw, t[u].raw);
        }
        part += loss;
      } else {
        part += pack_of_points<T, LOG_TARGET, LOG_INPUT, MODE>(x[u], t[u], nullptr, g);
      }
    }
    sum += double(part);
    if constexpr (kGrads) {
      if (grad_input != nullptr) store_chunk(grad_input + at, x, a.aligned);
      if (grad_target != nullptr) store_chunk(grad_target + at, t, a.aligned);
    }
  }

  // Less than a chunk is left: one element a thread, spread over the grid.
  const int64_t rest = a.n - chunks * kChunk;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rest; i += int64_t(gridDim.x) * kThreads) {
    const int64_t at = chunks * kChunk + i;
    const Point r = point<T, LOG_TARGET, LOG_INPUT>(ld_one(input + at), ld_one(target + at), g);
    sum += double(r.loss);
    if constexpr (kGrads) {
      if (grad_input != nullptr) st_one(grad_input + at, r.grad_input);
      if (grad_target != nullptr) st_one(grad_target + at, r.grad_target);
    }
  }

  __shared__ double shared[kThreads / kWarp];
  sum = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) {
    if (gridDim.x == 1) st_one(static_cast<T*>(a.out), float(sum * double(a.factor)));
    else a.partial[blockIdx.x] = sum;
  }
}

template <typename T, bool LOG_TARGET, bool LOG_INPUT, Mode MODE>
int launch_elements(const KlDivArgs& a, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(a.n, int64_t(kElementThreads) * Pack<T>::N);
  if (blocks > 0x7fffffff) return int(cudaErrorInvalidValue);
  const auto kernel = a.aligned ? kl_div_elements_kernel<T, LOG_TARGET, LOG_INPUT, MODE, true>
                                : kl_div_elements_kernel<T, LOG_TARGET, LOG_INPUT, MODE, false>;
  kernel<<<unsigned(blocks), kElementThreads, 0, stream>>>(a);
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

template <typename T, bool LOG_TARGET, bool LOG_INPUT, Mode MODE>
int launch(const KlDivArgs& a, double factor, const DeviceProps& props, cudaStream_t stream) {
  if constexpr (MODE != Mode::kReduce && MODE != Mode::kReduceGrads) {
    return launch_elements<T, LOG_TARGET, LOG_INPUT, MODE>(a, stream);
  } else {
    static int resident = 0;  // blocks an SM holds of this instance: the same on every device of the targets
    if (resident == 0) {
      int blocks = 0;
      FXFUSE_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks, kl_div_kernel<T, LOG_TARGET, LOG_INPUT, MODE>, kThreads, 0));
      resident = blocks;
    }
    constexpr int64_t kChunk = int64_t(kThreads) * kUnroll<MODE> * Pack<T>::N;
    const int64_t useful = ceil_div<int64_t>(a.n, kChunk);
    const int64_t most = int64_t(props.sm_count) * resident;
    const int blocks = int(useful < most ? useful : most < kMaxPartials ? most : kMaxPartials);
    kl_div_kernel<T, LOG_TARGET, LOG_INPUT, MODE><<<blocks, kThreads, 0, stream>>>(a);
    FXFUSE_CHECK_LAUNCH();
    if (blocks > 1) FXFUSE_CHECK(finish<T>(props, a.partial, blocks, factor, 1.0, a.out, stream));
    return 0;
  }
}

// From this size on there is enough to fill the rings.
constexpr int64_t kRingBytes = 8 << 20;

template <typename T>
int launch_ring(const KlDivArgs& a, double factor, const DeviceProps& props, cudaStream_t stream) {
  const int most = props.sm_count * kKlRingBlocks, blocks = most < kMaxPartials ? most : kMaxPartials;
  kl_div_ring_kernel<T><<<blocks, kKlRingThreads, 0, stream>>>(a);
  FXFUSE_CHECK_LAUNCH();
  FXFUSE_CHECK(finish<T>(props, a.partial, blocks, factor, 1.0, a.out, stream));
  return 0;
}

template <typename T, Mode MODE>
int choose(const KlDivArgs& a, double factor, bool log_target, bool log_input, const DeviceProps& props, cudaStream_t s) {
  if (MODE == Mode::kReduceGrads && log_input && !log_target && a.grad_target == nullptr && a.aligned &&
      a.n * int64_t(sizeof(T)) >= kRingBytes && is_hopper(props))
    return launch_ring<T>(a, factor, props, s);
  if (log_target && log_input) return launch<T, true, true, MODE>(a, factor, props, s);
  if (log_target) return launch<T, true, false, MODE>(a, factor, props, s);
  if (log_input) return launch<T, false, true, MODE>(a, factor, props, s);
  return launch<T, false, false, MODE>(a, factor, props, s);
}

bool all_aligned(const KlDivArgs& a, bool out_is_vector) {
  return aligned16(a.input) && aligned16(a.target) && (!a.grad_is_vector || aligned16(a.grad_output)) &&
         (!out_is_vector || aligned16(a.out)) && aligned16(a.grad_input) && aligned16(a.grad_target);
}

}  // namespace

// Loss of n elements. `reduce` != 0: `out` is one element, factor times the sum; with grad_input or grad_target not
// null these receive the gradients for an incoming gradient of 1. `reduce` == 0: `out` is n elements and no gradients
// are written. `scratch`: 4096 doubles (reduce only). n > 0; every tensor is dense and in the same order.
FXFUSE_API int fxfuse_kl_div_forward(const void* input, const void* target, void* out, void* grad_input,
                                     void* grad_target, void* scratch, int64_t n, double factor, int reduce,
                                     int log_target, int log_input, int dtype, int device, void* stream) {
  if (n <= 0) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(device, props);
  KlDivArgs a{input, target, nullptr, out, grad_input, grad_target, static_cast<double*>(scratch), n, float(factor),
         false, false};
  a.aligned = all_aligned(a, !reduce);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const bool grads = grad_input != nullptr || grad_target != nullptr;
  FXFUSE_DISPATCH(dtype, scalar_t, {
    if (!reduce) return choose<scalar_t, Mode::kNone>(a, factor, log_target, log_input, *props, s);
    if (grads) return choose<scalar_t, Mode::kReduceGrads>(a, factor, log_target, log_input, *props, s);
    return choose<scalar_t, Mode::kReduce>(a, factor, log_target, log_input, *props, s);
  });
  return 0;
}

// Gradients (null where not wanted) for an incoming gradient of n elements (grad_is_vector) or of one, times factor.
FXFUSE_API int fxfuse_kl_div_backward(const void* grad_output, const void* input, const void* target, void* grad_input,
                                      void* grad_target, int64_t n, double factor, int grad_is_vector, int log_target,
                                      int log_input, int dtype, int device, void* stream) {
  if (n <= 0) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(device, props);
  KlDivArgs a{input, target, grad_output, nullptr, grad_input, grad_target, nullptr, n, float(factor),
         grad_is_vector != 0, false};
  a.aligned = all_aligned(a, false);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  FXFUSE_DISPATCH(dtype, scalar_t, {
    if (grad_target == nullptr)
      return choose<scalar_t, Mode::kBackwardInput>(a, factor, log_target, log_input, *props, s);
    return choose<scalar_t, Mode::kBackward>(a, factor, log_target, log_input, *props, s);
  });
  return 0;
}
