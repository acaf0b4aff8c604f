// The asynchronous copies that the loss kernels use: Hopper's copy engine with mbarriers and clusters, and
// cp.async of 8.0. Empty on targets that lack the instruction.
#pragma once

#include "common.cuh"

namespace fxfuse {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- cp.async (8.0): 16 bytes a thread, in groups that are waited for in order --------------------------------------

__device__ __forceinline__ void async_load16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int IN_FLIGHT>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(IN_FLIGHT) : "memory");
}

// ---- mbarrier, bulk copy, cluster (9.0) -----------------------------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
// Between this thread's accesses to shared memory and later ones of the copy engine.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// One arrival, and `bytes` to come before the phase completes.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// One arrival.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// `bytes` (a multiple of 16) from aligned global memory; completes on the barrier. The data is read once: first to go.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "{\n\t.reg .b64 policy;\n\tcreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "policy;\n\t}" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Every thread of the cluster; what was written before it, also into other blocks' shared memory, is seen after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Waits for a phase completed by other blocks of the cluster, and sees what they told.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}"
      ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Writes `value` where `local` is, but in the shared memory of the cluster's block `rank`, counted in bytes at the
// barrier at the same place there.
template <typename V>
__device__ __forceinline__ void tell(V* local, const V& value, uint64_t* barrier, int rank) {
  static_assert(sizeof(V) % 8 == 0, "two words at a time");
  uint32_t address, remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&value);
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / 4); i += 2)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     address + 4 * i),
                 "r"(words[i]), "r"(words[i + 1]), "r"(remote_barrier)
                 : "memory");
}
// One warp of a block of THREADS waits until the others have arrived; they do not wait. Not the barrier of
// __syncthreads.
template <int THREADS>
__device__ __forceinline__ void barrier_wait_for() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
template <int THREADS>
__device__ __forceinline__ void barrier_arrive() { asm volatile("bar.arrive 1, %0;" ::"n"(THREADS) : "memory"); }
// Writes `value` where `local` is, but in the shared memory of the cluster's block `rank`.
template <typename V>
__device__ __forceinline__ void store_remote(V* local, int rank, const V& value) {
  static_assert(sizeof(V) % 4 == 0, "written a word at a time");
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&value);
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / 4); ++i)
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address + 4 * i), "r"(words[i]) : "memory");
}
#else
__device__ __forceinline__ void mbarrier_init(uint64_t*, int) {}
__device__ __forceinline__ void mbarrier_init_fence() {}
__device__ __forceinline__ void async_proxy_fence() {}
__device__ __forceinline__ void mbarrier_expect(uint64_t*, int) {}
__device__ __forceinline__ void mbarrier_arrive(uint64_t*) {}
__device__ __forceinline__ void mbarrier_wait(uint64_t*, int) {}
__device__ __forceinline__ void bulk_load(void*, const void*, int, uint64_t*) {}
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t*, int) {}
template <typename V>
__device__ __forceinline__ void tell(V*, const V&, uint64_t*, int) {}
template <int THREADS>
__device__ __forceinline__ void barrier_wait_for() {}
template <int THREADS>
__device__ __forceinline__ void barrier_arrive() {}
template <typename V>
__device__ __forceinline__ void store_remote(V*, int, const V&) {}
#endif

// Whether this is the last of `count` callers, which then starts the count anew.
__device__ __forceinline__ bool last_to_take(int* counter, int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  int before;
  asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;"
               : "=r"(before) : "r"(shared_address(counter)) : "memory");
  if (before != count - 1) return false;
  *counter = 0;
#endif
  return true;
}

}  // namespace fxfuse
