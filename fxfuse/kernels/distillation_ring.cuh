// Long rows with gradients on Hopper: read once, written once, with the memory kept busy between rows.
//
// A cluster of blocks shares a row. Every thread holds its part of it in registers from the load to the gradient. In
// front of the registers a block has a ring of slots in shared memory that the copy engine fills in order, row after
// row, in long copies; the last warp to take its part of a slot has it filled again. So the next rows are always on
// their way while this one's sums are exchanged and its gradients written.
//
// FOLLOWED: every thread arrives for itself at whatever orders shared memory, and a block that is alone in its cluster does
// not send to itself. Racecheck follows neither a counter, nor a lane that stands for its warp, nor a barrier at which some
// warps only arrive; memcheck calls such sends invalid. Up to 1.5 % slower.
//
//   take      a slice into registers, the maxima of a warp, then exponentials and sums (softmax_pair.cuh: the algebra)
//   publish   warps -> block -> every block of the cluster, by stores that count at the receiver's barrier
//   write     gradients from the registers
//
// Bytes moved: two reads and one write an element of a row pair, nothing else.
#pragma once

#include "distillation_rows.cuh"
#include "sm90.cuh"

#include <type_traits>

namespace fxfuse {

constexpr int kRingMostCluster = 16;
constexpr int kRingMostSlots = 4;
constexpr int kRingThreads = 256;

// A logit that counts nothing beside any other, which saves asking whether a lane has a pack. float16 has none such.
template <typename T> __device__ constexpr bool kPads = sizeof(T) == 4;
template <> __device__ constexpr bool kPads<__nv_bfloat16> = true;

struct RingPlan {
  int cluster;          // blocks that share a row
  int packs_per_block;  // the longest slice
  int chunks;           // of a slice
  int slots;            // of the ring
};

// Largest of a warp's values, none of them NaN; every lane gets it.
__device__ __forceinline__ float warp_largest(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  int bits = __float_as_int(x);
  bits = __reduce_max_sync(0xffffffffu, bits ^ ((bits >> 31) & 0x7fffffff));  // ordered as integers
  return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff));
#else
  return warp_max(x);
#endif
}

// A block's slice of a row is CHUNKS chunks at most, a chunk PACKS packs a thread and tensor. KEEP: only the student's
// gradient is wanted, and exponentials are kept in place of the logits. One block an SM, with all of its registers:
// what it spilled would go to L2, as shared memory leaves no L1.
template <typename T, bool LOG_TARGET, int CHUNKS, int PACKS, bool KEEP, bool FOLLOWED>
__global__ void __launch_bounds__(kRingThreads, 1) ring_kernel(DistillArgs a, RingPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int N = Pack<T>::N, kThreads = kRingThreads, kWarps = kThreads / kWarp, kChunk = PACKS * kThreads;
  extern __shared__ __align__(128) uint4 ring[];  // the copy engine is slower off a line of 128 bytes
  __shared__ alignas(8) uint64_t landed[kRingMostSlots];
  __shared__ int takers[kRingMostSlots];   // warps that have taken their part of a slot
  __shared__ alignas(8) uint64_t taken[FOLLOWED ? kRingMostSlots : 1];  // the same by threads
  __shared__ int64_t cursor_row;           // the next chunk to ask for
  __shared__ int cursor_chunk;
  __shared__ alignas(8) uint64_t told[2];  // the cluster's sums of a row have arrived
  __shared__ SharedLossQueue losses;  // of the cluster's first warp
  __shared__ int unusual;             // rows were noted
  __shared__ RowState warp_states[FOLLOWED ? 2 : 1][kWarps];
  __shared__ alignas(16) RowState block_states[2][kRingMostCluster];  // written by the cluster's blocks
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int cluster = plan.cluster, rank = int(blockIdx.x) % cluster;
  const int64_t group = blockIdx.x / cluster, groups = gridDim.x / cluster;
  const int64_t slice_first = int64_t(rank) * plan.packs_per_block;
  const T* const student = static_cast<const T*>(a.student);
  const T* const teacher = static_cast<const T*>(a.teacher);
  T* const grad_student = static_cast<T*>(a.grad_student);
  T* const grad_teacher = static_cast<T*>(a.grad_teacher);
  const Incoming in = incoming_gradient<T>(a);
  const bool teacher_grads = !KEEP && grad_teacher != nullptr;
  const auto slot_packs = [&](int slot) {  // the student's, then the teacher's
    return reinterpret_cast<Pack<T>*>(ring) + slot * (2 * kChunk);
  };
  const auto slice_packs = [&](const RowShape& shape) {
    const int64_t left = shape.packs - slice_first;
    return int(left < 0 ? 0 : left < plan.packs_per_block ? left : plan.packs_per_block);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.slots; ++i) {
      mbarrier_init(&landed[i], 1);
      takers[i] = 0;
      if constexpr (FOLLOWED) mbarrier_init(&taken[i], kThreads);
    }
    unusual = 0;
    losses.noted = 0;
    losses.sum = 0;
    mbarrier_init(&told[0], 1);
    mbarrier_init(&told[1], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_sync();  // no block tells another that has not started

  // Asks for the chunk at the cursor. One thread at a time: who fills a slot has taken the one before.
  const auto fill = [&](int slot) {
    if (cursor_row >= a.rows) return;
    const RowShape shape = RowShape::of(student + cursor_row * a.vocab, a.vocab, true);
    const int left = slice_packs(shape) - cursor_chunk * kChunk;
    const int count = left < 0 ? 0 : left < kChunk ? left : kChunk;
    mbarrier_expect(&landed[slot], 2 * count * 16);  // also for 0: every chunk is a phase
    if (count > 0) {
      const int64_t at = cursor_row * a.vocab + shape.head + (slice_first + cursor_chunk * kChunk) * N;
      bulk_load(slot_packs(slot), student + at, count * 16, &landed[slot]);
      bulk_load(slot_packs(slot) + kChunk, teacher + at, count * 16, &landed[slot]);
    }
    if (++cursor_chunk == plan.chunks) {
      cursor_chunk = 0;
      cursor_row += groups;
    }
  };
  if (threadIdx.x == 0) {
    cursor_row = group;
    cursor_chunk = 0;
    for (int slot = 0; slot < plan.slots; ++slot) fill(slot);
  }

  Pack<T> pad;
#pragma unroll
  for (int i = 0; i < N; ++i) pad.set(i, 100 * kLowest);

  const bool counts_loss = rank == 0 && warp == 0 && a.partial != nullptr;
  int round = 0, slot = 0, parity = 0, set = 0, told_parity = 0;
  for (int64_t row = group; row < a.rows; row += groups, ++round) {
    const RowShape shape = RowShape::of(student + row * a.vocab, a.vocab, true);
    const int mine_left = slice_packs(shape) - int(threadIdx.x);
    const int64_t row_at = row * a.vocab;
    const int64_t edge = slice_first == 0 && warp == 0 ? shape.edge(lane, a.vocab) : -1;
    const float edge_s = edge >= 0 ? ld_one(student + row_at + edge) : 0.f;
    const float edge_t = edge >= 0 ? ld_one(teacher + row_at + edge) : 0.f;
    Pack<T> s[CHUNKS * PACKS], t[CHUNKS * PACKS];  // number p * kThreads + threadIdx.x of the slice
    const auto has = [&](int p) { return p * kThreads < mine_left; };
    const auto counts = [&](int p) { return kPads<T> || has(p); };

#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (chunk >= plan.chunks) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) s[chunk * PACKS + i] = t[chunk * PACKS + i] = pad;
        continue;
      }
      mbarrier_wait(&landed[slot], parity);
      const Pack<T>* const from = slot_packs(slot);
#pragma unroll
      for (int i = 0; i < PACKS; ++i) {
        const int p = chunk * PACKS + i;
        if (has(p)) {
          s[p] = from[i * kThreads + threadIdx.x];
          t[p] = from[kChunk + i * kThreads + threadIdx.x];
        } else {
          s[p] = t[p] = pad;
        }
      }
      if constexpr (FOLLOWED) mbarrier_arrive(&taken[slot]);
      __syncwarp();  // in registers
      if (lane == 0 && last_to_take(&takers[slot], kWarps)) {
        if constexpr (FOLLOWED) mbarrier_wait(&taken[slot], parity);
        fill(slot);
      }
      if (++slot == plan.slots) {
        slot = 0;
        parity ^= 1;
      }
    }

    // Maxima of the warp first, so that nothing is rescaled.
    RowState state;
    {
      PackExtreme<T, true> most_s, most_t;
#pragma unroll
      for (int p = 0; p < CHUNKS * PACKS; ++p) {
        if (!counts(p)) continue;
        most_s.take(s[p]);
        most_t.take(t[p]);
      }
      state.mt = fmaxf(kLowest, most_t.get());
      state.ms = fmaxf(kLowest, most_s.get());
      if (edge >= 0) {
        state.mt = fmaxf(state.mt, edge_t);
        state.ms = fmaxf(state.ms, edge_s);
      }
      state.mt = warp_largest(state.mt);
      state.ms = warp_largest(state.ms);
    }
    if (kNeedsMinima<T> || teacher_grads) {
      PackExtreme<T, false> least_s, least_t;
#pragma unroll
      for (int p = 0; p < CHUNKS * PACKS; ++p) {
        if (!has(p)) continue;
        least_s.take(s[p]);
        least_t.take(t[p]);
      }
      state.ls = least_s.get();
      state.lt = least_t.get();
    }
#pragma unroll
    for (int p = 0; p < CHUNKS * PACKS; ++p) {
      if (!counts(p)) continue;
      if constexpr (KEEP) state.add_and_keep<T, LOG_TARGET>(s[p], t[p], a.scales);
      else state.add<T, LOG_TARGET, true>(s[p], t[p], a.scales);
    }
    if (edge >= 0) add_lone<T, LOG_TARGET, !KEEP>(state, edge_s, edge_t, a.scales);
    const float kept_mt = state.mt, kept_ms = state.ms;
    if constexpr (KEEP) {  // in float, as the errors of so many warps average out; under one maximum already
      state.zt = warp_sum(state.zt);
      state.zs = warp_sum(state.zs);
      state.d = warp_sum(state.d);
      state.join_minima<T, kWarp>(false);
    } else {
      state.join_lanes<T>(a.scales, teacher_grads);
    }

    // Publish: the first warp joins the block's states and tells them to every block. Room for two rows: a block can
    // be one row ahead of another, never two.
    RowState* const states = warp_states[FOLLOWED ? set : 0];
    if (lane == 0) states[warp] = state;
    if constexpr (FOLLOWED) __syncthreads();
    if (warp == 0) {
      if constexpr (!FOLLOWED) barrier_wait_for<kThreads>();
      state = states[lane % kWarps];
      state.join_lanes<T, kWarps>(a.scales, teacher_grads);
      if (FOLLOWED && cluster == 1) {
        if (lane == 0) {
          block_states[set][0] = state;
          mbarrier_arrive(&told[set]);
        }
      } else {
        if (lane == 0) mbarrier_expect(&told[set], cluster * int(sizeof(RowState)));
        __syncwarp();
        if (lane < cluster) tell(&block_states[set][rank], state, &told[set], lane);
      }
    } else if constexpr (!FOLLOWED) {
      barrier_arrive<kThreads>();
    }

    mbarrier_wait_cluster(&told[set], told_parity);
    // Every warp joins the blocks' states alike: in double where more than gradients of the student hang on them.
    const auto joined = [&](auto precise) {
      RowState whole;
      const auto join = [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        if (lane % kLanes < cluster) whole = block_states[set][lane % kLanes];
        if constexpr (decltype(precise)::value) whole.join_lanes<T, kLanes>(a.scales, teacher_grads);
        else whole.join_lanes_in_float<T, kLanes>(a.scales);
      };
      if (cluster > 8) join(std::integral_constant<int, 16>{});
      else join(std::integral_constant<int, 8>{});
      return whole;
    };
    const RowState whole = joined(std::bool_constant<!KEEP>{});

    // The rows that the sums cannot vouch for are noted, a share of them by each block, and done at the end.
    const bool plain = whole.plain<T>(a.scales, in.g);
    if (threadIdx.x == 0 && round % cluster == rank) {
      a.row_states[row].mt = plain ? 0.f : 1.f;
      if (!plain) unusual = 1;
    }
    if (plain) {
      RowGrads r;
      r.prepare<T, LOG_TARGET>(whole, a.scales, in, teacher_grads);
      const int64_t at = row_at + shape.head + (slice_first + threadIdx.x) * N;
      if constexpr (KEEP) {
        const float kept_a = r.a_s * exp2_fast(a.scales.s.shift<T>(kept_ms, r.ms));
        const float kept_b = r.b_s * exp2_fast(a.scales.t.shift<T>(kept_mt, r.mt));
#pragma unroll
        for (int p = 0; p < CHUNKS * PACKS; ++p)
          if (has(p)) r.write_kept(s[p], t[p], kept_a, kept_b, grad_student + at + p * kThreads * N);
      } else {
#pragma unroll
        for (int p = 0; p < CHUNKS * PACKS; ++p)
          if (has(p))
            r.write(s[p], t[p], grad_student != nullptr ? grad_student + at + p * kThreads * N : nullptr,
                    grad_teacher != nullptr ? grad_teacher + at + p * kThreads * N : nullptr, true);
      }
      if (edge >= 0)
        r.write_one(edge_s, edge_t, grad_student != nullptr ? grad_student + row_at + edge : nullptr,
                    grad_teacher != nullptr ? grad_teacher + row_at + edge : nullptr);
      if (counts_loss) losses.push(joined(std::true_type{}));  // the registers of the row are free by now
    }
    told_parity ^= set;
    set ^= 1;
  }
  __syncthreads();
  double loss = counts_loss ? losses.total() : 0;
  if (unusual != 0) {
    for (int64_t row = group + rank * groups; row < a.rows; row += cluster * groups) {
      if (a.row_states[row].mt == 0.f) continue;
      loss += exact_row_of<T, LOG_TARGET, kThreads>(a, row, in.g);
    }
  }
  if (a.partial != nullptr && threadIdx.x == 0) a.partial[blockIdx.x] = loss;
  cluster_sync();  // no block leaves while another may still tell it something
#endif
}

}  // namespace fxfuse
