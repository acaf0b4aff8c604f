// Shared by every kernel file: the C interface's conventions, device facts, 16-byte access, dtype conversion, reductions.
//
// A kernel file exports `FXFUSE_API int fxfuse_<op>_<what>(...)`. It returns 0 or a cudaError_t, allocates nothing and
// never synchronises: outputs and scratch come from the caller, so calls are stream ordered and can be captured.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>

#define FXFUSE_API extern "C" __attribute__((visibility("default")))

// Leaves the function with the error code when a CUDA call fails.
#define FXFUSE_CHECK(call)                                        \
  do {                                                            \
    const cudaError_t fxfuse_error_ = (call);                     \
    if (fxfuse_error_ != cudaSuccess) return int(fxfuse_error_);  \
  } while (0)

// To be written after each <<<...>>> launch. cudaGetLastError also clears the error, so that it is reported once.
#define FXFUSE_CHECK_LAUNCH() FXFUSE_CHECK(cudaGetLastError())

namespace fxfuse {

// The same numbers stand in abi.py: DTYPE_CODE.
enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Runs `body` with `scalar_t` bound to the element type of `code`; returns cudaErrorInvalidValue for an unknown code.
#define FXFUSE_DISPATCH(code, scalar_t, ...)                                      \
  switch (code) {                                                                 \
    case ::fxfuse::kFloat32: { using scalar_t = float; __VA_ARGS__; break; }      \
    case ::fxfuse::kFloat16: { using scalar_t = __half; __VA_ARGS__; break; }     \
    case ::fxfuse::kBFloat16: { using scalar_t = __nv_bfloat16; __VA_ARGS__; break; } \
    default: return int(cudaErrorInvalidValue);                                   \
  }

constexpr int kWarp = 32;

// ---------------------------------------------------------------------------------------------------------------------
// Host: the device
// ---------------------------------------------------------------------------------------------------------------------

struct DeviceProps {
  int sm_count;
  int smem_per_sm;           // bytes
  int smem_per_block;        // bytes a block may ask for after cudaFuncSetAttribute (opt-in limit)
  int l2_bytes;
  int max_threads_per_sm;
  int cc_major, cc_minor;    // as the hardware says; see compute_capability() for what code should act on
};

constexpr int kMaxDevices = 64;

// Facts about a device, read once per process. Racing threads write the same values.
inline cudaError_t device_props(int device, const DeviceProps** props) {
  static DeviceProps cache[kMaxDevices];
  static volatile bool known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  DeviceProps& p = cache[device];
  if (!known[device]) {
    const struct { cudaDeviceAttr attr; int* out; } wanted[] = {
        {cudaDevAttrMultiProcessorCount, &p.sm_count},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &p.smem_per_sm},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &p.smem_per_block},
        {cudaDevAttrL2CacheSize, &p.l2_bytes},
        {cudaDevAttrMaxThreadsPerMultiProcessor, &p.max_threads_per_sm},
        {cudaDevAttrComputeCapabilityMajor, &p.cc_major},
        {cudaDevAttrComputeCapabilityMinor, &p.cc_minor}};
    for (const auto& w : wanted) {
      const cudaError_t error = cudaDeviceGetAttribute(w.out, w.attr, device);
      if (error != cudaSuccess) return error;
    }
    __sync_synchronize();
    known[device] = true;
  }
  *props = &p;
  return cudaSuccess;
}

// Switches of the environment, read at each call, so that one process can run both roads.
inline bool is_on(const char* value) {
  return value != nullptr && value[0] != '\0' && !(value[0] == '0' && value[1] == '\0');
}
// Behave as on compute capability 8.0.
inline bool portable() { return is_on(std::getenv("FXFUSE_PORTABLE")); }
// Take the variants of kernels that compute-sanitizer can follow; the same bits.
inline bool followed() { return is_on(std::getenv("FXFUSE_FOLLOWED")); }

// major * 10 + minor, 80 under FXFUSE_PORTABLE. Code for sm_90a runs on 90 exactly.
inline int compute_capability(const DeviceProps& p) { return portable() ? 80 : p.cc_major * 10 + p.cc_minor; }
inline bool is_hopper(const DeviceProps& p) { return compute_capability(p) == 90; }

// Makes `device` current for a scope. Puts back the driver's context rather than calling cudaSetDevice(previous), which
// would create a context (and take its memory) on a device that nobody has used yet.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    int current = -1;
    error_ = cudaGetDevice(&current);
    if (error_ != cudaSuccess || current == device) return;
    const Driver& driver = Driver::get();
    if (driver.get_current != nullptr) driver.get_current(&previous_);
    restore_ = true;
    previous_device_ = current;
    error_ = cudaSetDevice(device);
  }
  ~DeviceScope() {
    if (!restore_) return;
    const Driver& driver = Driver::get();
    if (driver.set_current != nullptr) driver.set_current(previous_);
    else cudaSetDevice(previous_device_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t error() const { return error_; }

 private:
  struct Driver {
    int (*get_current)(void**) = nullptr;
    int (*set_current)(void*) = nullptr;
    static const Driver& get() {
      static const Driver driver;
      return driver;
    }
    Driver() {
      void *getter = nullptr, *setter = nullptr;
      cudaDriverEntryPointQueryResult got, set;
      if (entry("cuCtxGetCurrent", &getter, &got) == cudaSuccess && got == cudaDriverEntryPointSuccess &&
          entry("cuCtxSetCurrent", &setter, &set) == cudaSuccess && set == cudaDriverEntryPointSuccess) {
        get_current = reinterpret_cast<int (*)(void**)>(getter);
        set_current = reinterpret_cast<int (*)(void*)>(setter);
      }
    }
    static cudaError_t entry(const char* name, void** out, cudaDriverEntryPointQueryResult* result) {
#if CUDART_VERSION >= 12050
      return cudaGetDriverEntryPointByVersion(name, out, 12000, cudaEnableDefault, result);
#else
      return cudaGetDriverEntryPoint(name, out, cudaEnableDefault, result);
#endif
    }
  };
  cudaError_t error_ = cudaSuccess;
  bool restore_ = false;
  int previous_device_ = 0;
  void* previous_ = nullptr;
};

// Opens every exported function: device made current, facts in `props`.
#define FXFUSE_ON_DEVICE(device, props)             \
  ::fxfuse::DeviceScope fxfuse_scope_(device);      \
  FXFUSE_CHECK(fxfuse_scope_.error());              \
  const ::fxfuse::DeviceProps* props = nullptr;     \
  FXFUSE_CHECK(::fxfuse::device_props(device, &props))

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Device: dtypes and 16-byte access
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes of T as loaded: kept packed until used, so that several loads in flight cost four registers each.
template <typename T>
struct alignas(16) Pack {
  static constexpr int N = 16 / int(sizeof(T));
  union {
    uint4 raw;
    T at[N];
  };
  __device__ __forceinline__ Pack() {}
  // Element i as float; i must be a compile-time constant after unrolling.
  __device__ __forceinline__ float get(int i) const { return to_float(at[i]); }
  __device__ __forceinline__ void set(int i, float x) { at[i] = from_float<T>(x); }
};

// Global loads and stores of 16 aligned bytes.
// ld_stream: data read once (no L1 line kept; first to leave L2). ld_keep: data read again soon (stays in L2).
template <typename T>
__device__ __forceinline__ Pack<T> ld_stream(const T* p) {
  Pack<T> v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.raw.x), "=r"(v.raw.y), "=r"(v.raw.z), "=r"(v.raw.w) : "l"(p));
  return v;
}
template <typename T>
__device__ __forceinline__ Pack<T> ld_keep(const T* p) {
  Pack<T> v;
  v.raw = *reinterpret_cast<const uint4*>(p);
  return v;
}
template <typename T>
__device__ __forceinline__ void st_stream(T* p, const Pack<T>& v) {
  __stcs(reinterpret_cast<uint4*>(p), v.raw);
}
template <typename T>
__device__ __forceinline__ void st_keep(T* p, const Pack<T>& v) {
  *reinterpret_cast<uint4*>(p) = v.raw;
}

// One element, as float.
template <typename T>
__device__ __forceinline__ float ld_one(const T* p) { return to_float(*p); }
template <typename T>
__device__ __forceinline__ void st_one(T* p, float x) { *p = from_float<T>(x); }

// ---------------------------------------------------------------------------------------------------------------------
// Device: reductions in a fixed order (the same bits on every run)
// ---------------------------------------------------------------------------------------------------------------------

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct Max {  // NaN wins, as in torch.amax
  __device__ __forceinline__ float operator()(float a, float b) const { return (a > b || a != a) ? a : b; }
};

// Every lane gets the result. LANES (a power of two) neighbouring lanes reduce together.
template <int LANES = kWarp, typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int lane = LANES / 2; lane > 0; lane /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

template <int LANES = kWarp, typename T>
__device__ __forceinline__ T warp_sum(T x) { return warp_reduce<LANES>(x, Sum{}); }
template <int LANES = kWarp>
__device__ __forceinline__ float warp_max(float x) { return warp_reduce<LANES>(x, Max{}); }

// Sum over a block of THREADS (a multiple of 32); every thread gets the result. `shared` holds THREADS / 32 values and
// may be used again after the call.
template <int THREADS, typename T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  constexpr int kWarps = THREADS / kWarp;
  x = warp_sum(x);
  if constexpr (kWarps == 1) return x;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x += shared[w];
  __syncthreads();
  return x;
}

}  // namespace fxfuse
