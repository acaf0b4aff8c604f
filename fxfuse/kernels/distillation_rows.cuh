// What the roads of distillation_kl share: their arguments, the shape of a row in memory, and the road of short rows,
// where a warp holds a row in registers.
#pragma once

#include "softmax_pair.cuh"
#include "softmax_pair_exact.cuh"

#include <type_traits>

namespace fxfuse {

struct DistillArgs {
  const void* student;      // [rows, vocab], dense
  const void* teacher;
  const void* grad_output;  // one element that multiplies the gradients, or null for 1
  void* grad_student;       // null where not wanted
  void* grad_teacher;
  double* partial;          // kMaxPartials sums of row losses, or null where the loss is not wanted
  RowState* row_states;     // the road of long rows: one a row, then one a piece of a row
  RowState* pieces;
  int64_t rows, vocab;
  double temperature_s, temperature_t;
  double scale, factor;     // the loss is scale * (factor * sum)
  Scales scales;
};

// A row cut for 16-byte access: `head` single elements, `packs`, then single elements from `tail` on.
struct RowShape {
  int head;
  int64_t packs, tail;

  template <typename T>
  __device__ __forceinline__ static RowShape of(const T* row, int64_t vocab, bool aligned) {
    constexpr int N = Pack<T>::N;
    RowShape r;
    r.head = aligned ? int((16 - (reinterpret_cast<uintptr_t>(row) & 15)) & 15) / int(sizeof(T)) : 0;
    if (r.head > vocab) r.head = int(vocab);
    r.packs = (vocab - r.head) / N;
    r.tail = r.head + r.packs * N;
    return r;
  }
  // The single elements, one a lane (there are at most 14): its index in the row, or -1.
  __device__ __forceinline__ int64_t edge(int lane, int64_t vocab) const {
    if (lane < head) return lane;
    const int64_t i = tail + lane - head;
    return i < vocab ? i : -1;
  }
};

template <typename T>
__device__ __forceinline__ Incoming incoming_gradient(const DistillArgs& a) {
  const double given = a.grad_output == nullptr ? 1. : double(ld_one(static_cast<const T*>(a.grad_output)));
  // Eager stores the product with the scale, and that with the factor: where these are 0 or infinite, so is g.
  const float scaled = range_as<T>(float(given * a.scale));
  double wide = (scaled == 0.f || isinf(scaled) ? double(scaled) : given * a.scale) * a.factor;
  const float g = range_as<T>(float(wide));
  if (g == 0.f || isinf(g)) wide = double(g);
  return {g, float(wide / a.temperature_s), float(wide / a.temperature_t * 0.6931471805599453094)};
}

// A row as eager does it (softmax_pair_exact.cuh), by a whole block. Returns its loss.
template <typename T, bool LOG_TARGET, int THREADS>
__device__ __forceinline__ double exact_row_of(const DistillArgs& a, int64_t row, float g) {
  const int64_t at = row * a.vocab;
  return exact_row<T, LOG_TARGET, THREADS>(
      static_cast<const T*>(a.student) + at, static_cast<const T*>(a.teacher) + at, a.vocab, float(a.temperature_s),
      float(a.temperature_t), g, a.grad_student != nullptr ? static_cast<T*>(a.grad_student) + at : nullptr,
      a.grad_teacher != nullptr ? static_cast<T*>(a.grad_teacher) + at : nullptr);
}

// Takes a lone pair of logits into a state whose maxima may not cover it yet.
template <typename T, bool LOG_TARGET, bool SPLIT>
__device__ __forceinline__ void add_lone(RowState& state, float s, float t, Scales c) {
  const float max_t = fmaxf(state.mt, t), max_s = fmaxf(state.ms, s);
  if (max_t != state.mt || max_s != state.ms) state.move_maxima<T, SPLIT>(max_t, max_s, c);
  state.lt = fminf(state.lt, t);
  state.ls = fminf(state.ls, s);
  state.add<T, LOG_TARGET, SPLIT>(s, t, c);
}

// ---------------------------------------------------------------------------------------------------------------------
// Short rows: a warp a row, held in registers
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kWarpRowThreads = 256;

// The longest row of this road: four packs a lane, eight of float32 where rows are whole packs.
template <typename T>
constexpr int64_t warp_row_vocab(bool aligned) {
  return int64_t(kWarp) * Pack<T>::N * (aligned && sizeof(T) == 4 ? 8 : 4);
}

// PACKS a lane. ALIGNED: every row of every tensor starts on 16 bytes and is whole packs.
template <typename T, bool LOG_TARGET, int PACKS, bool ALIGNED>
__global__ void __launch_bounds__(kWarpRowThreads) warp_rows_kernel(DistillArgs a) {
  constexpr int N = Pack<T>::N, kWarps = kWarpRowThreads / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, vocab = int(a.vocab);
  const bool grads = a.grad_student != nullptr || a.grad_teacher != nullptr;
  const Incoming in = grads ? incoming_gradient<T>(a) : Incoming{};
  const bool teacher = a.grad_teacher != nullptr;
  __shared__ int64_t unusual[kWarps];
  LossQueue losses;
  // Index in the row of element i of pack k: packs for aligned rows, else neighbouring lanes on neighbouring elements.
  const auto index = [&](int k, int i) { return ALIGNED ? (k * kWarp + lane) * N + i : (k * N + i) * kWarp + lane; };

  for (int64_t first = int64_t(blockIdx.x) * kWarps; first < a.rows; first += int64_t(gridDim.x) * kWarps) {
    const int64_t row = first + warp;
    bool plain = true;
    if (row < a.rows) {
      const T* const s = static_cast<const T*>(a.student) + row * a.vocab;
      const T* const t = static_cast<const T*>(a.teacher) + row * a.vocab;
      Pack<T> ps[PACKS], pt[PACKS];
#pragma unroll
      for (int k = 0; k < PACKS; ++k) {
        if constexpr (ALIGNED) {
          if (index(k, 0) < vocab) {
            ps[k] = ld_stream(s + index(k, 0));
            pt[k] = ld_stream(t + index(k, 0));
          }
        } else {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (index(k, i) < vocab) {
              ps[k].at[i] = s[index(k, i)];
              pt[k].at[i] = t[index(k, i)];
            }
          }
        }
      }
      RowState state;
      float max_s = -kInf, max_t = -kInf, min_s = kInf, min_t = kInf;
#pragma unroll
      for (int k = 0; k < PACKS; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (index(k, i) >= vocab) continue;
          const float sv = ps[k].get(i), tv = pt[k].get(i);
          max_s = fmaxf(max_s, sv);
          max_t = fmaxf(max_t, tv);
          min_s = fminf(min_s, sv);
          min_t = fminf(min_t, tv);
        }
      // The row's own maxima before any sum: what follows needs no rescaling.
      state.mt = fmaxf(kLowest, warp_reduce(max_t, RowState::MaxNumber{}));
      state.ms = fmaxf(kLowest, warp_reduce(max_s, RowState::MaxNumber{}));
      state.lt = min_t;
      state.ls = min_s;
      const auto add_all = [&](auto split) {
#pragma unroll
        for (int k = 0; k < PACKS; ++k)
#pragma unroll
          for (int i = 0; i < N; ++i)
            if (index(k, i) < vocab) {
              float sv = ps[k].get(i), tv = pt[k].get(i);
              state.add<T, LOG_TARGET, decltype(split)::value>(sv, tv, a.scales);
            }
      };
      if (teacher) add_all(std::true_type{});
      else add_all(std::false_type{});
      state.join_lanes<T>(a.scales, teacher);
      plain = state.plain<T>(a.scales, in.g);
      if (plain && a.partial != nullptr) losses.push(state);
      if (plain && grads) {
        RowGrads r;
        r.prepare<T, LOG_TARGET>(state, a.scales, in, teacher);
        T* const gs = a.grad_student != nullptr ? static_cast<T*>(a.grad_student) + row * a.vocab : nullptr;
        T* const gt = a.grad_teacher != nullptr ? static_cast<T*>(a.grad_teacher) + row * a.vocab : nullptr;
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
          if constexpr (ALIGNED) {
            const int at = index(k, 0);
            if (at < vocab) r.write(ps[k], pt[k], gs != nullptr ? gs + at : gs, gt != nullptr ? gt + at : gt, true);
          } else {
#pragma unroll
            for (int i = 0; i < N; ++i) {
              const int at = index(k, i);
              if (at >= vocab) continue;
              r.write_one(ps[k].get(i), pt[k].get(i), gs != nullptr ? gs + at : gs, gt != nullptr ? gt + at : gt);
            }
          }
        }
      }
    }
    // Rows that the pass cannot vouch for: rare, and done by the whole block.
    if (!__syncthreads_or(!plain)) continue;
    if (lane == 0) unusual[warp] = plain ? -1 : row;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (unusual[w] < 0) continue;
      const double loss = exact_row_of<T, LOG_TARGET, kWarpRowThreads>(a, unusual[w], in.g);
      if (threadIdx.x == 0) losses.sum += loss;
    }
    __syncthreads();
  }
  if (a.partial != nullptr) {
    __shared__ double shared[kWarps];
    losses.flush();
    const double sum = block_sum<kWarpRowThreads>(losses.sum, shared);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
  }
}

}  // namespace fxfuse
