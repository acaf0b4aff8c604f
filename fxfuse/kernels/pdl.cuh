// Programmatic dependent launch (Hopper): a kernel starts while the one before it in the stream still runs, does what
// does not depend on it, and waits. Elsewhere launches are plain, the stream order does the waiting, and the device
// functions are empty.
#pragma once

#include "common.cuh"

#include <atomic>

namespace fxfuse {

// Returns when every earlier kernel of the stream has ended and its writes are visible. A kernel launched to
// overlap calls it in every thread before it touches memory that the kernel before it writes.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start. Call it after pdl_wait() where the next kernel reads, before its own pdl_wait(), what the
// kernels before this one wrote.
__device__ __forceinline__ void pdl_release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel, beside the one before it if `overlap`. Only code compiled for Hopper holds the wait, so only there
// may it overlap; and a kernel that reads anything before its pdl_wait() may overlap only a kernel of this library,
// which has released it when that was safe.
template <typename... Params, typename... Args>
inline cudaError_t launch(const DeviceProps& props, bool overlap, void (*kernel)(Params...), unsigned grid,
                          unsigned block, size_t smem, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = overlap && is_hopper(props) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// Lets a kernel have `bytes` of dynamic shared memory, and asks for all of the L1 as shared memory: two kernels can
// share a multiprocessor only where they agree on that. Done once per kernel and (current) device.
template <auto KERNEL>
inline cudaError_t prepare_shared_memory(int bytes) {
  static std::atomic<uint64_t> done{0};
  static_assert(kMaxDevices <= 64, "one bit a device");
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (done.load(std::memory_order_relaxed) >> device & 1)) return error;
  if (bytes > 0) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (error == cudaSuccess) done.fetch_or(uint64_t(1) << device, std::memory_order_relaxed);
  return error;
}

}  // namespace fxfuse
