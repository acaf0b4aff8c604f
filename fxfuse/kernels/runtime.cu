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

// The number of the capture that a stream is in, 0 where it is in none.
FXFUSE_API int fxfuse_capture(void* stream, unsigned long long* number) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  *number = 0;
  FXFUSE_CHECK(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, number));
  if (status != cudaStreamCaptureStatusActive) *number = 0;
  return 0;
}
