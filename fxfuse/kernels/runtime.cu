// What the loader asks of the library itself.
#include "common.cuh"

// Name and meaning of a code that an exported function returned.
FXFUSE_API const char* fxfuse_error_name(int code) { return cudaGetErrorName(cudaError_t(code)); }
FXFUSE_API const char* fxfuse_error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }

// The compute capability that the kernels act on, times ten: 80 under FXFUSE_PORTABLE.
FXFUSE_API int fxfuse_compute_capability(int* out, int device) {
  const fxfuse::DeviceProps* props = nullptr;
  FXFUSE_CHECK(fxfuse::device_props(device, &props));
  *out = fxfuse::compute_capability(*props);
  return 0;
}
