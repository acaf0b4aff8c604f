// The ring of shared-memory stages between the producer, which has the copy engine fill them, and the consumer warpgroups.
//
// In a cluster a stage is filled by the producers of all its blocks (multicast), so it is free only when the consumers of
// all blocks have let go of it.
#pragma once

#include "barrier.cuh"

namespace fxfuse::hopper {

// FILLERS and CONSUMERS: arrivals that fill and free a stage.
template <int STAGES, int CONSUMERS, int CLUSTER, int FILLERS = 1>
class Ring {
 public:
  static constexpr int kBarrierBytes = 2 * STAGES * 8;

  // `barriers`: shared memory for kBarrierBytes, 8-byte aligned.
  __device__ __forceinline__ explicit Ring(uint32_t barriers) : barriers_(barriers) {}

  // By one thread, before anybody uses the ring.
  __device__ __forceinline__ void initialise() const {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full(i), FILLERS);
      mbarrier_init(empty(i), CONSUMERS * CLUSTER);
    }
  }

  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ == STAGES) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  // Producer: waits for the current stage to be free, then announces what will arrive in it.
  __device__ __forceinline__ uint32_t acquire(uint32_t bytes) const {
    wait_free();
    mbarrier_arrive_expect(full(stage_), bytes);
    return full(stage_);
  }
  __device__ __forceinline__ void wait_free() const { mbarrier_wait(empty(stage_), parity_ ^ 1); }
  // A filler that writes by itself: its part of the current stage is there.
  __device__ __forceinline__ void filled() const { mbarrier_arrive(full(stage_)); }

  // Consumer: waits for the current stage's data; lets go of a stage (called by a whole warpgroup, `thread` in it).
  __device__ __forceinline__ void wait_filled() const { mbarrier_wait(full(stage_), parity_); }
  __device__ __forceinline__ void release(int stage, int thread) const {
    if constexpr (CLUSTER == 1) {
      if (thread == 0) mbarrier_arrive(empty(stage));
    } else {
      if (thread < CLUSTER) mbarrier_arrive_at(empty(stage), thread);
    }
  }
  // By each warp of its own accord: the current stage is free of its reads.
  __device__ __forceinline__ void release_by_warp(int lane) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty(stage_));
  }

 private:
  __device__ __forceinline__ uint32_t full(int i) const { return barriers_ + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return barriers_ + 8 * (STAGES + i); }

  uint32_t barriers_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace fxfuse::hopper
