// scale * sum_j (x W^T + b)_ij collapsed to y = scale * (x . v + beta), v = sum_j W_j, beta = sum_j b_j; its backward.
//
// forward   colsum (W -> v, bias -> beta), rowdot (x, v -> y): W and x are read once.
// backward  colsum weighted by g (x -> one row of dW, g -> its sum), rank1 (dx, dW and db, each written once).
#include "colsum_plan.cuh"
#include "rank1.cuh"
#include "rowdot.cuh"

namespace fxfuse {
namespace {

// float64 elements at the head of the backward's scratch: the sum of g, and the row of dW in float32.
int64_t backward_extra(int64_t k) { return 2 + (k + 1) / 2; }

// Bytes, measured on an H200: what rowdot keeps in flight on a multiprocessor; what memory delivers while rowdot
// starts, and while v is handed over to it.
constexpr double kPrefetch = 192 << 10, kStart = 4e6, kHandover = 20e6;

template <typename T>
cudaError_t forward(const DeviceProps& props, const T* x, int64_t ldx, int64_t m, const T* w, int64_t ldw, int64_t n,
                    int64_t k, const T* bias, float* v, double* beta, double* scratch, double scale, void* y,
                    bool y_float, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (w != nullptr) {
    const ColsumPlan plan = plan_colsum(props, w, n, k, ldw, sizeof(T), false);
    ColsumArgs<T> args = {};
    args.a = w, args.ld = ldw, args.rows = n, args.cols = k;
    args.extra = bias, args.extra_count = n, args.extra_stride = 1, args.extra_sum = bias != nullptr ? beta : nullptr;
    args.scale = 1.0, args.out = v;
    // rowdot is let in when this much of w is left to read: late, so that x still arrives while the last of v is added
    // up and handed over, when memory would be idle, but not so late that x is what all wait for.
    const double x_bytes = min(double(m) * k * sizeof(T), props.sm_count * kPrefetch);
    const double left = kStart + max(0.0, x_bytes - kHandover);
    const double lead = min(1.0, left / (double(n) * k * sizeof(T) + 1));
    error = launch_colsum<T, false>(props, plan, args, lead, scratch, stream);
  }
  if (error != cudaSuccess || y == nullptr) return error;
  RowdotArgs<T> args = {};
  args.x = x, args.ld = ldx, args.rows = m;
  args.v = v, args.beta = beta, args.scale = scale, args.y = y, args.y_float = y_float;
  args.v_ready = w == nullptr;
  return launch_rowdot(props, args, k, stream);
}

template <typename T>
cudaError_t backward(const DeviceProps& props, const T* g, int64_t g_stride, const T* x, int64_t ldx, int64_t m,
                     int64_t n, int64_t k, const float* v, double scale, T* dx, T* dw, T* db, double* scratch,
                     cudaStream_t stream) {
  double* g_sum = scratch;
  float* row = reinterpret_cast<float*>(scratch + 2);
  double* partial = scratch + backward_extra(k);
  if (dw != nullptr || db != nullptr) {
    const int64_t cols = dw != nullptr ? k : 0;
    const ColsumPlan plan = plan_colsum(props, x, m, k, ldx, sizeof(T), true);
    ColsumArgs<T> args = {};
    args.a = x, args.ld = ldx, args.rows = m, args.cols = cols, args.g = g, args.g_stride = g_stride;
    args.extra = g, args.extra_count = m, args.extra_stride = g_stride;
    args.extra_sum = db != nullptr ? g_sum : nullptr;
    args.scale = scale, args.out = row;
    const cudaError_t error = launch_colsum<T, true>(props, plan, args, 1.0, partial, stream);
    if (error != cudaSuccess) return error;
  }
  Rank1Args<T> args = {};
  args.cols = max(k, int64_t(1)), args.scale = float(scale);
  args.dx = m > 0 && k > 0 ? dx : nullptr, args.dx_rows = m, args.g = g, args.g_stride = g_stride, args.v = v;
  args.dw = n > 0 && k > 0 ? dw : nullptr, args.dw_rows = n, args.row = row;
  args.db = n > 0 ? db : nullptr, args.g_sum = g_sum;
  return launch_rank1(props, args, dw != nullptr || db != nullptr, stream);
}

}  // namespace
}  // namespace fxfuse

// float64 elements of scratch: of the forward for w [rows, cols], of the backward (`weighted`) for x [rows, cols]; at
// row stride ld, with or without its first element at a multiple of 16 bytes.
FXFUSE_API int fxfuse_matmul_div_sum_scale_scratch(int64_t rows, int64_t cols, int64_t ld, int aligned, int weighted,
                                                   int64_t* elements, int dtype, int device) {
  FXFUSE_ON_DEVICE(device, props);
  const int element = dtype == fxfuse::kFloat32 ? 4 : 2;
  const void* address = reinterpret_cast<const void*>(uintptr_t(aligned ? 0 : element));
  *elements = fxfuse::plan_colsum(*props, address, rows, cols, ld, element, weighted).scratch(cols);
  if (weighted) *elements += fxfuse::backward_extra(cols);
  return 0;
}

// x [m, k] at row stride ldx, w [n, k] at ldw, bias [n] or null -> y [m], and v [k] (float32, 16-byte aligned) and,
// with a bias, beta (float64). w null: v and beta (or null) are given. y null: only v and beta are computed. y is
// float32 where y_float is not 0.
FXFUSE_API int fxfuse_matmul_div_sum_scale_forward(const void* x, int64_t ldx, int64_t m, const void* w, int64_t ldw,
                                                   int64_t n, int64_t k, const void* bias, void* v, void* beta,
                                                   void* scratch, double scale, void* y, int y_float, int dtype,
                                                   int device, void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  FXFUSE_DISPATCH(dtype, scalar_t, {
    FXFUSE_CHECK(fxfuse::forward<scalar_t>(
        *props, static_cast<const scalar_t*>(x), ldx, m, static_cast<const scalar_t*>(w), ldw, n, k,
        static_cast<const scalar_t*>(bias), static_cast<float*>(v), static_cast<double*>(beta),
        static_cast<double*>(scratch), scale, y, y_float != 0, static_cast<cudaStream_t>(stream)));
  });
  return 0;
}

// g [m] at g_stride, x [m, k] at ldx (read only for dw), v [k] (only for dx) -> those of dx [m, k], dw [n, k], db [n]
// that are not null, contiguous and 16-byte aligned.
FXFUSE_API int fxfuse_matmul_div_sum_scale_backward(const void* g, int64_t g_stride, const void* x, int64_t ldx,
                                                    int64_t m, int64_t n, int64_t k, const void* v, double scale,
                                                    void* dx, void* dw, void* db, void* scratch, int dtype, int device,
                                                    void* stream) {
  FXFUSE_ON_DEVICE(device, props);
  FXFUSE_DISPATCH(dtype, scalar_t, {
    FXFUSE_CHECK(fxfuse::backward<scalar_t>(
        *props, static_cast<const scalar_t*>(g), g_stride, static_cast<const scalar_t*>(x), ldx, m, n, k,
        static_cast<const float*>(v), scale, static_cast<scalar_t*>(dx), static_cast<scalar_t*>(dw),
        static_cast<scalar_t*>(db), static_cast<double*>(scratch), static_cast<cudaStream_t>(stream)));
  });
  return 0;
}
