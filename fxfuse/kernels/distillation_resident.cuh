// Rows that fit on the chip: read once into shared memory, reduced, and turned into gradients without a second read.
//
// A group of blocks (on Hopper a cluster of up to 16, elsewhere one block) shares a row; every warp owns a slice of it
// in its block's shared memory, from filling it to the last read, so that it can start on its slice of the next row
// while others still write gradients. On Hopper the copy engine fills the slices and the blocks exchange their sums
// through distributed shared memory; elsewhere cp.async does the first, and the second is not needed.
#pragma once

#include "distillation_rows.cuh"
#include "sm90.cuh"

namespace fxfuse {

constexpr int kResidentThreads = 256;
constexpr int kMostCluster = 16;
constexpr int kMostStages = 2;

struct ResidentPlan {
  int cluster = 1;         // blocks that share a row
  int stages = 1;          // rows a block holds at a time
  int threads = kResidentThreads;
  int packs_per_warp = 0;  // the longest slice
  int smem_bytes = 0;
};

// THREADS: kResidentThreads, or half as many where a block holds a short row and more blocks fit beside each other.
template <typename T, bool LOG_TARGET, bool HOPPER, int THREADS>
__global__ void __launch_bounds__(THREADS, 768 / THREADS) resident_kernel(DistillArgs a, ResidentPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kRuns = !HOPPER;
#else
  constexpr bool kRuns = true;
#endif
  if constexpr (kRuns) {
    constexpr int N = Pack<T>::N, kWarps = THREADS / kWarp;
    extern __shared__ __align__(128) uint4 slices[];
    __shared__ alignas(8) uint64_t arrived[kMostStages][kWarps];
    __shared__ RowState warp_states[2][kWarps];
    __shared__ RowState block_states[2][kMostCluster];  // written by the cluster's other blocks
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int cluster = HOPPER ? plan.cluster : 1;
    const int rank = HOPPER ? int(blockIdx.x) % cluster : 0;
    const int64_t group = blockIdx.x / cluster, groups = gridDim.x / cluster;
    const int64_t slice_first = int64_t(rank * kWarps + warp) * plan.packs_per_warp;
    const T* const student = static_cast<const T*>(a.student);
    const T* const teacher = static_cast<const T*>(a.teacher);
    T* const grad_student = static_cast<T*>(a.grad_student);
    T* const grad_teacher = static_cast<T*>(a.grad_teacher);
    const bool grads = grad_student != nullptr || grad_teacher != nullptr;
    const Incoming in = grads ? incoming_gradient<T>(a) : Incoming{};
    const bool keep = grad_student != nullptr && grad_teacher == nullptr;
    const bool teacher_grads = grad_teacher != nullptr;

    const auto slice = [&](int stage, int tensor) {
      return reinterpret_cast<Pack<T>*>(slices) +
             int64_t((stage * kWarps + warp) * 2 + tensor) * plan.packs_per_warp;
    };
    const auto slice_packs = [&](const RowShape& shape) {
      const int64_t left = shape.packs - slice_first;
      return int(left < 0 ? 0 : left < plan.packs_per_warp ? left : plan.packs_per_warp);
    };
    const auto fill = [&](int64_t row, int stage) {
      const RowShape shape = RowShape::of(student + row * a.vocab, a.vocab, true);
      const int count = slice_packs(shape);
      const int64_t at = row * a.vocab + shape.head + slice_first * N;
      if constexpr (HOPPER) {
        if (lane == 0) mbarrier_expect(&arrived[stage][warp], 2 * count * 16);  // also for 0: every row is a phase
        if (lane == 0 && count > 0) {
          bulk_load(slice(stage, 0), student + at, count * 16, &arrived[stage][warp]);
          bulk_load(slice(stage, 1), teacher + at, count * 16, &arrived[stage][warp]);
        }
      } else {
        for (int i = lane; i < count; i += kWarp) {
          async_load16(slice(stage, 0) + i, student + at + i * N);
          async_load16(slice(stage, 1) + i, teacher + at + i * N);
        }
        async_commit();
      }
    };

    if constexpr (HOPPER) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < kMostStages * kWarps; ++i) mbarrier_init(&arrived[0][0] + i, 1);
        mbarrier_init_fence();
      }
      __syncthreads();
      if (cluster > 1) cluster_sync();  // no block writes into another that has not started
    }
    for (int stage = 0; stage < plan.stages; ++stage) {
      if (group + stage * groups < a.rows) fill(group + stage * groups, stage);
      else if (!HOPPER) async_commit();
    }

    LossQueue losses;  // of the group's first warp
    int round = 0;
    for (int64_t row = group; row < a.rows; row += groups, ++round) {
      const int stage = plan.stages == 1 ? 0 : round % 2;
      const RowShape shape = RowShape::of(student + row * a.vocab, a.vocab, true);
      const int count = slice_packs(shape);
      const int64_t row_at = row * a.vocab;
      const int64_t edge = slice_first == 0 ? shape.edge(lane, a.vocab) : -1;
      const float edge_s = edge >= 0 ? ld_one(student + row_at + edge) : 0.f;
      const float edge_t = edge >= 0 ? ld_one(teacher + row_at + edge) : 0.f;
      Pack<T>* const s = slice(stage, 0);
      Pack<T>* const t = slice(stage, 1);
      if constexpr (HOPPER) {
        mbarrier_wait(&arrived[stage][warp], (plan.stages == 1 ? round : round / 2) & 1);
      } else {
        if (plan.stages == 1) async_wait<0>();
        else async_wait<1>();
        __syncwarp();
      }

      // The slice's maxima first, its sums second: shared memory is cheap to read twice and nothing is rescaled.
      RowState state;
      {
        PackExtreme<T, true> most_s, most_t;
#pragma unroll 4
        for (int i = lane; i < count; i += kWarp) {
          most_s.take(s[i]);
          most_t.take(t[i]);
        }
        state.mt = fmaxf(kLowest, most_t.get());
        state.ms = fmaxf(kLowest, most_s.get());
      }
      if (kNeedsMinima<T> || teacher_grads) {
        PackExtreme<T, false> least_s, least_t;
        for (int i = lane; i < count; i += kWarp) {
          least_s.take(s[i]);
          least_t.take(t[i]);
        }
        state.lt = least_t.get();
        state.ls = least_s.get();
      }
      const float lane_mt = state.mt, lane_ms = state.ms;
#pragma unroll 2
      for (int i = lane; i < count; i += kWarp) {
        Pack<T> vs = s[i], vt = t[i];
        if (keep) {
          state.add_and_keep<T, LOG_TARGET>(vs, vt, a.scales);
          s[i] = vs;
          t[i] = vt;
        } else if (teacher_grads) {
          state.add<T, LOG_TARGET, true>(vs, vt, a.scales);
        } else {
          state.add<T, LOG_TARGET>(vs, vt, a.scales);
        }
      }
      if (edge >= 0 && teacher_grads) add_lone<T, LOG_TARGET, true>(state, edge_s, edge_t, a.scales);
      else if (edge >= 0) add_lone<T, LOG_TARGET, false>(state, edge_s, edge_t, a.scales);
      state.join_lanes<T>(a.scales, teacher_grads);

      // Warps to block, blocks to cluster. Two sets of slots: a block can be one row ahead, never two.
      const int set = round & 1;
      if (lane == 0) warp_states[set][warp] = state;
      __syncthreads();
      if (cluster == 1 || warp == 0) {
        state = warp_states[set][lane % kWarps];
        state.join_lanes<T, kWarps>(a.scales, teacher_grads);
      }
      if constexpr (HOPPER) {
        if (cluster > 1) {
          if (warp == 0 && lane < cluster) store_remote(&block_states[set][rank], lane, state);
          cluster_sync();
          state = lane % kMostCluster < cluster ? block_states[set][lane % kMostCluster] : RowState{};
          state.join_lanes<T, kMostCluster>(a.scales, teacher_grads);
        }
      }

      if (!state.plain<T>(a.scales, in.g)) {
        if (rank == 0) {
          const double loss = exact_row_of<T, LOG_TARGET, THREADS>(a, row, in.g);
          if (threadIdx.x == 0) losses.sum += loss;
        }
      } else {
        if (rank == 0 && warp == 0 && a.partial != nullptr) losses.push(state);
        if (grads) {
          RowGrads r;
          r.prepare<T, LOG_TARGET>(state, a.scales, in, teacher_grads);
          const int64_t at = row_at + shape.head + slice_first * N;
          if (keep) {
            const float lane_a = r.a_s * exp2_fast(a.scales.s.shift<T>(lane_ms, r.ms));
            const float lane_b = r.b_s * exp2_fast(a.scales.t.shift<T>(lane_mt, r.mt));
#pragma unroll 2
            for (int i = lane; i < count; i += kWarp)
              r.write_kept(s[i], t[i], lane_a, lane_b, grad_student + at + i * N);
          } else {
            for (int i = lane; i < count; i += kWarp) {
              const Pack<T> vs = s[i], vt = t[i];
              r.write(vs, vt, grad_student != nullptr ? grad_student + at + i * N : nullptr, grad_teacher + at + i * N,
                      true);
            }
          }
          if (edge >= 0)
            r.write_one(edge_s, edge_t, grad_student != nullptr ? grad_student + row_at + edge : nullptr,
                        grad_teacher != nullptr ? grad_teacher + row_at + edge : nullptr);
        }
      }
      if (HOPPER && keep) async_proxy_fence();  // written by threads, next by the copy engine
      __syncwarp();  // the slice is free: this warp's share of a later row may fill it
      const int64_t next = row + plan.stages * groups;
      if (next < a.rows) fill(next, stage);
      else if (!HOPPER) async_commit();  // keeps the count of groups in flight
    }
    if (a.partial != nullptr && rank == 0 && warp == 0) {
      const double sum = losses.total();
      if (lane == 0) a.partial[group] = sum;
    }
    if constexpr (HOPPER) {
      if (cluster > 1) cluster_sync();  // no block leaves while another may still write into it
    }
  }
}

}  // namespace fxfuse
