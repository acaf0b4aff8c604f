// The distillation loss of every element (no reduction), and its gradients, from the logits on: where rows are held between
// the pass that sums and the one that writes (softmax_pair_elements.cuh has the algebra).
//
// A row short enough stays in the registers of a warp or a block between the two; a block that reads its row again begins at
// the end, which L2 still holds; few long rows are cut in pieces, a block each, and read again by a second kernel. Bytes: 2
// reads and a write an element forward, 3 and the gradients backward, and what L2 lost.
#pragma once

#include "distillation_stream.cuh"
#include "softmax_pair_elements.cuh"

namespace fxfuse {

// One row: where it lies, and what becomes of its packs and lone elements.
template <typename T, bool FLOW, bool ALIGNED>
struct ElementRow {
  static constexpr int N = Pack<T>::N;
  const ElementArgs& args;
  int64_t at;  // of the row in every tensor
  float constant;

  __device__ __forceinline__ ElementRow(const ElementArgs& a, int64_t row) : args(a), at(row * a.vocab) {
    constant = FLOW && !a.grad_is_vector ? ld_one(static_cast<const T*>(a.grad)) : 0.f;
  }
  __device__ __forceinline__ const T* student(int64_t i) const { return static_cast<const T*>(args.student) + at + i; }
  __device__ __forceinline__ const T* teacher(int64_t i) const { return static_cast<const T*>(args.teacher) + at + i; }
  __device__ __forceinline__ const T* grad(int64_t i) const { return static_cast<const T*>(args.grad) + at + i; }
  __device__ __forceinline__ float g_of(int64_t i) const {
    return FLOW && args.grad_is_vector ? ld_one(grad(i)) : constant;
  }
  // The packs that begin at element i, i + step, ..
  template <int COUNT>
  __device__ __forceinline__ void load(Pack<T> (&s)[COUNT], Pack<T> (&t)[COUNT], Pack<T> (&g)[COUNT], int64_t i,
                                       int64_t step) const {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      s[k] = load_pack(student(i + k * step), ALIGNED);
      t[k] = load_pack(teacher(i + k * step), ALIGNED);
      if (FLOW && args.grad_is_vector) g[k] = load_pack(grad(i + k * step), ALIGNED);
    }
  }
  __device__ __forceinline__ void write(const ElementResults<T, FLOW>& r, const Pack<T>& s, const Pack<T>& t,
                                        const Pack<T>& g, int64_t i) const {
    Pack<T> p;
    if constexpr (!FLOW) {
#pragma unroll
      for (int e = 0; e < N; ++e) p.set(e, r.loss(args, s.get(e), t.get(e)));
      store_pack(static_cast<T*>(args.loss) + at + i, p, ALIGNED);
    } else {
      const auto g_at = [&](int e) { return args.grad_is_vector ? g.get(e) : constant; };
      float q[N];
#pragma unroll
      for (int e = 0; e < N; ++e) q[e] = r.exponential(args, t.get(e));
      if (args.grad_student != nullptr) {
#pragma unroll
        for (int e = 0; e < N; ++e) p.set(e, r.student(args, s.get(e), q[e], g_at(e)));
        store_pack(static_cast<T*>(args.grad_student) + at + i, p, ALIGNED);
      }
      if (args.grad_teacher != nullptr) {
#pragma unroll
        for (int e = 0; e < N; ++e) p.set(e, r.teacher(args, s.get(e), t.get(e), q[e], g_at(e)));
        store_pack(static_cast<T*>(args.grad_teacher) + at + i, p, ALIGNED);
      }
    }
  }
  __device__ __forceinline__ void write_one(const ElementResults<T, FLOW>& r, float s, float t, float g,
                                            int64_t i) const {
    if constexpr (!FLOW) {
      st_one(static_cast<T*>(args.loss) + at + i, r.loss(args, s, t));
    } else {
      const float e = r.exponential(args, t);
      if (args.grad_student != nullptr) st_one(static_cast<T*>(args.grad_student) + at + i, r.student(args, s, e, g));
      if (args.grad_teacher != nullptr) st_one(static_cast<T*>(args.grad_teacher) + at + i, r.teacher(args, s, t, e, g));
    }
  }
  // By a whole block, as eager does it.
  template <int THREADS>
  __device__ __forceinline__ void exact() const {
    ExactElements<T> each;
    each.scale = float(args.scale);
    if constexpr (FLOW) each.grad = args.grad_is_vector ? grad(0) : nullptr;
    else each.loss = static_cast<T*>(args.loss) + at;
    T* const to_s = args.grad_student != nullptr ? static_cast<T*>(args.grad_student) + at : nullptr;
    T* const to_t = args.grad_teacher != nullptr ? static_cast<T*>(args.grad_teacher) + at : nullptr;
    const float g = FLOW ? range_as<T>(constant * each.scale) : 1.f;
    if (args.log_target)
      exact_row<T, true, THREADS>(student(0), teacher(0), args.vocab, float(args.temperature_s),
                                  float(args.temperature_t), g, to_s, to_t, each);
    else
      exact_row<T, false, THREADS>(student(0), teacher(0), args.vocab, float(args.temperature_s),
                                   float(args.temperature_t), g, to_s, to_t, each);
  }
};

template <typename T, bool FLOW, int THREADS>
struct ElementBlock {
  ElementState<T, FLOW> states[THREADS / kWarp];
  ElementResults<T, FLOW> results;
};

// Joins the states of a block's threads; the first warp gets the result.
template <typename T, bool FLOW, int THREADS>
__device__ __forceinline__ ElementState<T, FLOW> join_block(ElementState<T, FLOW> state, const ElementArgs& a,
                                                            ElementBlock<T, FLOW, THREADS>& block) {
  constexpr int kWarps = THREADS / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  state.join_lanes(a);
  if (lane == 0) block.states[warp] = state;
  __syncthreads();
  if (warp == 0) {
    state = block.states[lane % kWarps];
    state.template join_lanes<kWarps>(a);
  }
  return state;
}

// What the row's results need, from the states of a block's threads: derived by one of them, as it takes divisions in
// double. Every thread gets it; the block's memory may be written anew after a barrier.
template <typename T, bool FLOW, int THREADS>
__device__ __forceinline__ ElementResults<T, FLOW> conclude(const ElementState<T, FLOW>& state, const ElementArgs& a,
                                                            ElementBlock<T, FLOW, THREADS>& block) {
  const ElementState<T, FLOW> joined = join_block(state, a, block);
  if (threadIdx.x == 0) block.results = ElementResults<T, FLOW>::of(joined, a);
  __syncthreads();
  return block.results;
}

// A thread's sums of packs [first, last) of a row, and of its lone elements where `edges`.
template <typename T, bool FLOW, bool ALIGNED, int THREADS>
__device__ __forceinline__ ElementState<T, FLOW> element_sums(const ElementRow<T, FLOW, ALIGNED>& row,
                                                              const RowShape& shape, int64_t first, int64_t last,
                                                              bool edges) {
  constexpr int N = Pack<T>::N, kUnroll = FLOW ? 2 : kStreamUnroll<T, ALIGNED>;
  const ElementArgs& a = row.args;
  const float lowest = lowest_distance(a.log_target);
  ElementState<T, FLOW> state;
  int64_t i = first + threadIdx.x;
  for (; i + (kUnroll - 1) * THREADS < last; i += kUnroll * THREADS) {
    Pack<T> s[kUnroll], t[kUnroll], g[kUnroll];
    row.load(s, t, g, shape.head + i * N, THREADS * N);
    state.take(s, t, g, row.constant, lowest, a);
  }
  for (; i < last; i += THREADS) {
    Pack<T> s[1], t[1], g[1];
    row.load(s, t, g, shape.head + i * N, 0);
    state.take(s, t, g, row.constant, lowest, a);
  }
  const int64_t edge = edges && threadIdx.x < kWarp ? shape.edge(int(threadIdx.x), a.vocab) : -1;
  if (edge >= 0) state.take_lone(ld_one(row.student(edge)), ld_one(row.teacher(edge)), row.g_of(edge), lowest, a);
  return state;
}

// Writes the results of the same packs and lone elements, from the last to the first.
template <typename T, bool FLOW, bool ALIGNED, int THREADS>
__device__ __forceinline__ void element_writes(const ElementRow<T, FLOW, ALIGNED>& row, const RowShape& shape,
                                               int64_t first, int64_t last, bool edges,
                                               const ElementResults<T, FLOW>& results) {
  constexpr int N = Pack<T>::N, kUnroll = 2;
  int64_t i = last - 1 - threadIdx.x;
  for (; i - (kUnroll - 1) * THREADS >= first; i -= kUnroll * THREADS) {
    Pack<T> s[kUnroll], t[kUnroll], g[kUnroll];
    row.load(s, t, g, shape.head + i * N, -int64_t(THREADS) * N);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) row.write(results, s[k], t[k], g[k], shape.head + (i - k * THREADS) * N);
  }
  for (; i >= first; i -= THREADS) {
    Pack<T> s[1], t[1], g[1];
    row.load(s, t, g, shape.head + i * N, 0);
    row.write(results, s[0], t[0], g[0], shape.head + i * N);
  }
  const int64_t edge = edges && threadIdx.x < kWarp ? shape.edge(int(threadIdx.x), row.args.vocab) : -1;
  if (edge >= 0)
    row.write_one(results, ld_one(row.student(edge)), ld_one(row.teacher(edge)), row.g_of(edge), edge);
}

// A block a row, read twice.
template <typename T, bool FLOW, bool ALIGNED, int THREADS>
__global__ void __launch_bounds__(THREADS, THREADS < 1024 ? 1024 / THREADS : 1) element_rows_kernel(ElementArgs a) {
  __shared__ ElementBlock<T, FLOW, THREADS> block;
  for (int64_t index = blockIdx.x; index < a.rows; index += gridDim.x) {
    const ElementRow<T, FLOW, ALIGNED> row(a, index);
    const RowShape shape = RowShape::of(row.student(0), a.vocab, ALIGNED);
    const ElementResults<T, FLOW> results =
        conclude(element_sums<T, FLOW, ALIGNED, THREADS>(row, shape, 0, shape.packs, true), a, block);
    if (results.plain) element_writes<T, FLOW, ALIGNED, THREADS>(row, shape, 0, shape.packs, true, results);
    else row.template exact<THREADS>();
    __syncthreads();  // the states are written anew
  }
}

// Blocks an SM is to have room for: 1024 threads, fewer of the small ones where they need the registers.
template <typename T, bool FLOW>
constexpr int held_blocks(int threads) {
  return threads >= 1024 ? 1 : (kExactTeacher<T, FLOW> && threads <= 256 ? 768 : 1024) / threads;
}

// A block a row, held in registers: PACKS a thread, and a lone element where there is one.
template <typename T, bool FLOW, int THREADS, int PACKS>
__global__ void __launch_bounds__(THREADS, held_blocks<T, FLOW>(THREADS)) element_held_kernel(ElementArgs a) {
  __shared__ ElementBlock<T, FLOW, THREADS> block;
  constexpr int N = Pack<T>::N;
  const float lowest = lowest_distance(a.log_target);
  for (int64_t index = blockIdx.x; index < a.rows; index += gridDim.x) {
    const ElementRow<T, FLOW, true> row(a, index);
    const RowShape shape = RowShape::of(row.student(0), a.vocab, true);
    const int first = threadIdx.x, packs = int(shape.packs);
    const int64_t edge = first < kWarp ? shape.edge(first, a.vocab) : -1;
    Pack<T> s[PACKS], t[PACKS];
    [[maybe_unused]] Pack<T> g[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int i = first + k * THREADS;
      if (i >= packs) continue;
      s[k] = ld_stream(row.student(shape.head + i * N));
      t[k] = ld_stream(row.teacher(shape.head + i * N));
      if (FLOW && a.grad_is_vector) g[k] = ld_stream(row.grad(shape.head + i * N));
    }
    float lone_s = 0, lone_t = 0, lone_g = 0;
    if (edge >= 0) {
      lone_s = ld_one(row.student(edge));
      lone_t = ld_one(row.teacher(edge));
      lone_g = row.g_of(edge);
    }
    ElementState<T, FLOW> state;
    if (first + (PACKS - 1) * THREADS < packs) {
      state.take(s, t, g, row.constant, lowest, a);
    } else {
#pragma unroll
      for (int k = 0; k < PACKS; ++k) {
        if (first + k * THREADS >= packs) continue;
        const Pack<T> one_s[1] = {s[k]}, one_t[1] = {t[k]}, one_g[1] = {g[k]};
        state.take(one_s, one_t, one_g, row.constant, lowest, a);
      }
    }
    if (edge >= 0) state.take_lone(lone_s, lone_t, lone_g, lowest, a);
    const ElementResults<T, FLOW> results = conclude(state, a, block);
    if (results.plain) {
#pragma unroll
      for (int k = 0; k < PACKS; ++k) {
        const int i = first + k * THREADS;
        if (i < packs) row.write(results, s[k], t[k], g[k], shape.head + i * N);
      }
      if (edge >= 0) row.write_one(results, lone_s, lone_t, lone_g, edge);
    } else {
      row.template exact<THREADS>();
    }
    __syncthreads();  // the states are written anew
  }
}

constexpr int kMostPieces = kStreamThreads;  // of a row: a thread takes in each

// Few long rows: a block a piece.
template <typename T, bool FLOW, bool ALIGNED>
__global__ void __launch_bounds__(kStreamThreads) element_pieces_kernel(ElementArgs a) {
  __shared__ ElementBlock<T, FLOW, kStreamThreads> block;
  const int pieces = a.pieces_per_row, piece = blockIdx.x % pieces;
  const ElementRow<T, FLOW, ALIGNED> row(a, blockIdx.x / pieces);
  const RowShape shape = RowShape::of(row.student(0), a.vocab, ALIGNED);
  const ElementState<T, FLOW> state =
      join_block(element_sums<T, FLOW, ALIGNED, kStreamThreads>(row, shape, shape.packs * piece / pieces,
                                                                shape.packs * (piece + 1) / pieces, piece == 0),
                 a, block);
  if (threadIdx.x == 0) static_cast<ElementState<T, FLOW>*>(a.pieces)[blockIdx.x] = state;
}

// Every block joins its row's pieces anew, by the same operations in the same order, and writes its own.
template <typename T, bool FLOW, bool ALIGNED>
__global__ void __launch_bounds__(kStreamThreads) element_pieces_write_kernel(ElementArgs a) {
  __shared__ ElementBlock<T, FLOW, kStreamThreads> block;
  const int pieces = a.pieces_per_row, number = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  pdl_wait();
  ElementState<T, FLOW> state;
  if (int(threadIdx.x) < pieces)
    state = static_cast<const ElementState<T, FLOW>*>(a.pieces)[number * pieces + threadIdx.x];
  const ElementResults<T, FLOW> results = conclude(state, a, block);
  const ElementRow<T, FLOW, ALIGNED> row(a, number);
  if (!results.plain) {
    if (piece == 0) row.template exact<kStreamThreads>();
    return;
  }
  const RowShape shape = RowShape::of(row.student(0), a.vocab, ALIGNED);
  element_writes<T, FLOW, ALIGNED, kStreamThreads>(row, shape, shape.packs * piece / pieces,
                                                   shape.packs * (piece + 1) / pieces, piece == 0, results);
}

// Short rows: a warp a row, held in registers, PACKS a lane. ALIGNED: every row of every tensor is whole aligned packs.
template <typename T, bool FLOW, bool ALIGNED, int PACKS>
__global__ void __launch_bounds__(kWarpRowThreads) element_warps_kernel(ElementArgs a) {
  constexpr int N = Pack<T>::N, kWarps = kWarpRowThreads / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, vocab = int(a.vocab);
  const float lowest = lowest_distance(a.log_target);
  __shared__ int64_t unusual[kWarps];
  const auto index = [&](int k, int i) { return ALIGNED ? (k * kWarp + lane) * N + i : (k * N + i) * kWarp + lane; };
  for (int64_t first = int64_t(blockIdx.x) * kWarps; first < a.rows; first += int64_t(gridDim.x) * kWarps) {
    const int64_t number = first + warp;
    bool plain = true;
    if (number < a.rows) {
      const ElementRow<T, FLOW, ALIGNED> row(a, number);
      Pack<T> s[PACKS], t[PACKS];
      [[maybe_unused]] Pack<T> g[PACKS];
#pragma unroll
      for (int k = 0; k < PACKS; ++k) {
        if constexpr (ALIGNED) {
          if (index(k, 0) < vocab) {
            s[k] = ld_stream(row.student(index(k, 0)));
            t[k] = ld_stream(row.teacher(index(k, 0)));
            if (FLOW && a.grad_is_vector) g[k] = ld_stream(row.grad(index(k, 0)));
          }
        } else {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (index(k, i) < vocab) {
              s[k].at[i] = *row.student(index(k, i));
              t[k].at[i] = *row.teacher(index(k, i));
              if (FLOW && a.grad_is_vector) g[k].at[i] = *row.grad(index(k, i));
            }
          }
        }
      }
      const auto g_at = [&](int k, int i) { return FLOW && a.grad_is_vector ? g[k].get(i) : row.constant; };
      ElementState<T, FLOW> state;
      float max_s = -kInf, max_t = -kInf;
#pragma unroll
      for (int k = 0; k < PACKS; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (index(k, i) >= vocab) continue;
          const float sv = s[k].get(i), tv = t[k].get(i);
          max_s = fmaxf(max_s, sv);
          max_t = fmaxf(max_t, tv);
          state.row.ls = fminf(state.row.ls, sv);
          state.row.lt = fminf(state.row.lt, tv);
        }
      state.row.mt = fmaxf(kLowest, warp_reduce(max_t, RowState::MaxNumber{}));
      state.row.ms = fmaxf(kLowest, warp_reduce(max_s, RowState::MaxNumber{}));
      const auto add_all = [&](auto student) {
#pragma unroll
        for (int k = 0; k < PACKS; ++k)
#pragma unroll
          for (int i = 0; i < N; ++i)
            if (index(k, i) < vocab)
              state.template add<decltype(student)::value>(s[k].get(i), t[k].get(i), g_at(k, i), lowest, a);
      };
      if (FLOW && a.grad_teacher == nullptr) add_all(std::true_type{});
      else add_all(std::false_type{});
      state.join_lanes(a);
      const ElementResults<T, FLOW> results = ElementResults<T, FLOW>::of(state, a);
      plain = results.plain;
      if (plain) {
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
          if constexpr (ALIGNED) {
            if (index(k, 0) < vocab) row.write(results, s[k], t[k], g[k], index(k, 0));
          } else {
#pragma unroll
            for (int i = 0; i < N; ++i)
              if (index(k, i) < vocab)
                row.write_one(results, s[k].get(i), t[k].get(i), g_at(k, i), index(k, i));
          }
        }
      }
    }
    // Rows that the sums cannot vouch for: rare, and done by the whole block.
    if (!__syncthreads_or(!plain)) continue;
    if (lane == 0) unusual[warp] = plain ? -1 : number;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (unusual[w] < 0) continue;
      ElementRow<T, FLOW, ALIGNED>(a, unusual[w]).template exact<kWarpRowThreads>();
    }
    __syncthreads();
  }
}

}  // namespace fxfuse
