// Rows of any length, split over the whole device: one pass for the sums of pieces of rows, a small one that joins the
// pieces, and where gradients are wanted a second read. The road of a forward without gradients, of rows too long for
// shared memory, and of tensors whose 16-byte boundaries do not fall together.
#pragma once

#include "distillation_rows.cuh"
#include "pdl.cuh"

namespace fxfuse {

constexpr int kStreamThreads = 256;
constexpr int kStreamWarps = kStreamThreads / kWarp;
// Packs of each row under way in a thread; fewer where a pack is many loads.
template <typename T, bool ALIGNED> constexpr int kStreamUnroll = ALIGNED || sizeof(T) == 4 ? 4 : 2;
constexpr int kStreamMaxBlocks = 4096;

// The rows' units (every row cut in `per_row` equal ones) are dealt out in one contiguous run a block.
struct Deal {
  int64_t units;
  int per_row, blocks;

  __host__ __device__ int64_t start(int64_t block) const { return block * units / blocks; }
  __host__ __device__ int64_t block_of(int64_t unit) const { return ((unit + 1) * blocks - 1) / units; }
};

// Takes COUNT packs of each row into the state: their maxima first, then their sums.
template <typename T, bool LOG_TARGET, bool SPLIT, int COUNT>
__device__ __forceinline__ void add_packs(RowState& state, const Pack<T> (&s)[COUNT], const Pack<T> (&t)[COUNT],
                                          Scales c) {
  PackExtreme<T, true> most_s(s[0]), most_t(t[0]);
#pragma unroll
  for (int k = 1; k < COUNT; ++k) {
    most_s.take(s[k]);
    most_t.take(t[k]);
  }
  if constexpr (kNeedsMinima<T> || SPLIT) {
    PackExtreme<T, false> least_s(s[0]), least_t(t[0]);
#pragma unroll
    for (int k = 1; k < COUNT; ++k) {
      least_s.take(s[k]);
      least_t.take(t[k]);
    }
    state.ls = fminf(state.ls, least_s.get());
    state.lt = fminf(state.lt, least_t.get());
  }
  const float max_t = fmaxf(state.mt, most_t.get()), max_s = fmaxf(state.ms, most_s.get());
  if (max_t != state.mt || max_s != state.ms) state.move_maxima<T, SPLIT>(max_t, max_s, c);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) state.add<T, LOG_TARGET, SPLIT>(s[k], t[k], c);
}

// A block's share of a row, in whole packs and lone elements.
struct Share {
  RowShape shape;
  int64_t first, last;  // packs
  bool edges;           // the lone elements belong to the share with the row's first unit

  template <typename T>
  __device__ __forceinline__ static Share of(const T* row, int64_t vocab, bool aligned, int unit, int end, int units) {
    Share r;
    r.shape = RowShape::of(row, vocab, aligned);
    r.first = r.shape.packs * unit / units;
    r.last = r.shape.packs * end / units;
    r.edges = unit == 0;
    return r;
  }
};

// Calls `row_part(row, unit, end)` for every row that a block has units of.
template <typename F>
__device__ __forceinline__ void for_each_share(const Deal& deal, F row_part) {
  const int64_t end = deal.start(blockIdx.x + 1);
  for (int64_t unit = deal.start(blockIdx.x); unit < end;) {
    const int64_t row = unit / deal.per_row;
    const int from = int(unit - row * deal.per_row);
    const int64_t left = end - unit;
    const int to = left < deal.per_row - from ? from + int(left) : deal.per_row;
    row_part(row, from, to);
    unit += to - from;
  }
}

// One state for every (row, block) that meet, at pieces[row + block]: no two pairs have the same sum.
// ALIGNED is a parameter of the template, since as a number the loads of single elements that it rules out would still
// pass through the loop, a third of its instructions. TEACHER: its gradient is wanted.
template <typename T, bool LOG_TARGET, bool ALIGNED, bool TEACHER>
__global__ void __launch_bounds__(kStreamThreads, 4) stream_sums_kernel(DistillArgs a, Deal deal) {
  constexpr int N = Pack<T>::N, kUnroll = kStreamUnroll<T, ALIGNED>;
  __shared__ RowState warp_states[2][kStreamWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int set = 0;
  for_each_share(deal, [&](int64_t row, int unit, int end) {
    const T* const s = static_cast<const T*>(a.student) + row * a.vocab;
    const T* const t = static_cast<const T*>(a.teacher) + row * a.vocab;
    const Share share = Share::of(s, a.vocab, ALIGNED, unit, end, deal.per_row);
    const T* const ps = s + share.shape.head;
    const T* const pt = t + share.shape.head;
    RowState state;
    int64_t i = share.first + threadIdx.x;
    for (; i + (kUnroll - 1) * kStreamThreads < share.last; i += kUnroll * kStreamThreads) {
      Pack<T> vs[kUnroll], vt[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        vs[k] = load_pack(ps + (i + k * kStreamThreads) * N, ALIGNED);
        vt[k] = load_pack(pt + (i + k * kStreamThreads) * N, ALIGNED);
      }
      add_packs<T, LOG_TARGET, TEACHER, kUnroll>(state, vs, vt, a.scales);
    }
    for (; i < share.last; i += kStreamThreads) {
      const Pack<T> vs[1] = {load_pack(ps + i * N, ALIGNED)}, vt[1] = {load_pack(pt + i * N, ALIGNED)};
      add_packs<T, LOG_TARGET, TEACHER, 1>(state, vs, vt, a.scales);
    }
    const int64_t edge = share.edges && warp == 0 ? share.shape.edge(lane, a.vocab) : -1;
    if (edge >= 0) add_lone<T, LOG_TARGET, TEACHER>(state, ld_one(s + edge), ld_one(t + edge), a.scales);
    state.join_lanes<T>(a.scales, TEACHER);
    if (lane == 0) warp_states[set][warp] = state;
    __syncthreads();
    if (warp == 0) {
      state = warp_states[set][lane % kStreamWarps];
      state.join_lanes<T, kStreamWarps>(a.scales, TEACHER);
      if (lane == 0) a.pieces[row + blockIdx.x] = state;
    }
    set ^= 1;
  });
}

// Joins the pieces of a row (a warp each) into row_states and partial sums of losses. Rows that the sums cannot vouch
// for are done here, gradients too, and marked with a NaN maximum.
template <typename T, bool LOG_TARGET>
__global__ void __launch_bounds__(kStreamThreads) stream_rows_kernel(DistillArgs a, Deal deal) {
  __shared__ int64_t unusual[kStreamWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool grads = a.grad_student != nullptr || a.grad_teacher != nullptr;
  const Incoming in = grads ? incoming_gradient<T>(a) : Incoming{};
  const bool teacher = a.grad_teacher != nullptr;
  LossQueue losses;
  pdl_wait();
  for (int64_t base = int64_t(blockIdx.x) * kStreamWarps; base < a.rows; base += int64_t(gridDim.x) * kStreamWarps) {
    const int64_t row = base + warp;
    bool plain = true;
    if (row < a.rows) {
      const int64_t last = deal.block_of((row + 1) * deal.per_row - 1);
      RowState state;
      for (int64_t block = deal.block_of(row * deal.per_row) + lane; block <= last; block += kWarp)
        state.join<T>(a.pieces[row + block], a.scales);
      state.join_lanes<T>(a.scales, teacher);
      plain = state.plain<T>(a.scales, in.g);
      if (plain && a.partial != nullptr) losses.push(state);
      if (lane == 0) {
        if (!plain) state.mt = __int_as_float(0x7fffffff);
        a.row_states[row] = state;
      }
    }
    if (!__syncthreads_or(!plain)) continue;
    if (lane == 0) unusual[warp] = plain ? -1 : row;
    __syncthreads();
    for (int w = 0; w < kStreamWarps; ++w) {
      if (unusual[w] < 0) continue;
      const double loss = exact_row_of<T, LOG_TARGET, kStreamThreads>(a, unusual[w], in.g);
      if (threadIdx.x == 0) losses.sum += loss;
    }
    __syncthreads();
  }
  if (a.partial != nullptr) {
    __shared__ double shared[kStreamWarps];
    losses.flush();
    const double sum = block_sum<kStreamThreads>(losses.sum, shared);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
  }
}

// The second read: gradients from the rows' states.
template <typename T, bool LOG_TARGET, bool ALIGNED>
__global__ void __launch_bounds__(kStreamThreads, 4) stream_grads_kernel(DistillArgs a, Deal deal) {
  constexpr int N = Pack<T>::N;
  constexpr int kUnroll = 2;
  const Incoming in = incoming_gradient<T>(a);
  T* const grad_student = static_cast<T*>(a.grad_student);
  T* const grad_teacher = static_cast<T*>(a.grad_teacher);
  for_each_share(deal, [&](int64_t row, int unit, int end) {
    const RowState state = a.row_states[row];
    if (state.mt != state.mt) return;  // done when the rows were joined
    const int64_t row_at = row * a.vocab;
    const T* const s = static_cast<const T*>(a.student) + row_at;
    const T* const t = static_cast<const T*>(a.teacher) + row_at;
    const Share share = Share::of(s, a.vocab, ALIGNED, unit, end, deal.per_row);
    const int64_t at = row_at + share.shape.head;
    RowGrads r;
    r.prepare<T, LOG_TARGET>(state, a.scales, in, grad_teacher != nullptr);
    const auto write = [&](const Pack<T>& vs, const Pack<T>& vt, int64_t i) {
      r.write(vs, vt, grad_student != nullptr ? grad_student + at + i * N : nullptr,
              grad_teacher != nullptr ? grad_teacher + at + i * N : nullptr, ALIGNED);
    };
    const T* const from_s = s + share.shape.head;
    const T* const from_t = t + share.shape.head;
    int64_t i = share.first + threadIdx.x;
    for (; i + (kUnroll - 1) * kStreamThreads < share.last; i += kUnroll * kStreamThreads) {
      Pack<T> vs[kUnroll], vt[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        vs[k] = load_pack(from_s + (i + k * kStreamThreads) * N, ALIGNED);
        vt[k] = load_pack(from_t + (i + k * kStreamThreads) * N, ALIGNED);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) write(vs[k], vt[k], i + k * kStreamThreads);
    }
    for (; i < share.last; i += kStreamThreads)
      write(load_pack(from_s + i * N, ALIGNED), load_pack(from_t + i * N, ALIGNED), i);
    const int64_t edge = share.edges && threadIdx.x < kWarp ? share.shape.edge(threadIdx.x, a.vocab) : -1;
    if (edge >= 0)
      r.write_one(ld_one(s + edge), ld_one(t + edge), grad_student != nullptr ? grad_student + row_at + edge : nullptr,
                  grad_teacher != nullptr ? grad_teacher + row_at + edge : nullptr);
  });
}

}  // namespace fxfuse
