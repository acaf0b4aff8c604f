// The distillation loss without a reduction, and its gradients: distillation_elements.cuh has the roads.
//   warps    short rows: a warp a row, held in registers
//   held     a block a row, held in registers
//   rows     a block a row, read twice, the second time from L2 as far as it holds them
//   pieces   fewer rows than multiprocessors: a row cut over several blocks, two kernels
#include "distillation_elements.cuh"

namespace {

using namespace fxfuse;

// Pairs of rows of more bytes than this: one large block an SM, so that fewer rows wait in L2 for their second read.
constexpr int64_t kLargeRowBytes = 196608;
constexpr int64_t kPieceElements = 8192;

struct ElementCall {
  ElementArgs args;
  const DeviceProps& props;
  cudaStream_t stream;
  bool together, rows_aligned;
};

// A block for each of `useful` shares of the rows: passes that write as much as they read are faster so than with as many
// blocks as run at a time.
template <typename Kernel>
int launch_blocks(Kernel kernel, const ElementCall& call, int threads, int64_t useful) {
  constexpr int64_t kMost = 0x7fffffff;
  kernel<<<unsigned(useful < kMost ? useful : kMost), threads, 0, call.stream>>>(call.args);
  FXFUSE_CHECK_LAUNCH();
  return 0;
}

// Packs that a lane may hold of each tensor: eight of three and their work leave too few warps.
template <typename T, bool FLOW> constexpr int kMostWarpPacks = sizeof(T) == 4 && !FLOW ? 8 : 4;

template <typename T, bool FLOW>
int run_warps(const ElementCall& call) {
  constexpr int kRow = kWarp * Pack<T>::N;
  const int64_t vocab = call.args.vocab, blocks = ceil_div<int64_t>(call.args.rows, kWarpRowThreads / kWarp);
  const auto go = [&](auto kernel) { return launch_blocks(kernel, call, kWarpRowThreads, blocks); };
  if (call.rows_aligned) {
    if (vocab <= kRow) return go(element_warps_kernel<T, FLOW, true, 1>);
    if (vocab <= kRow * 2) return go(element_warps_kernel<T, FLOW, true, 2>);
    if constexpr (kMostWarpPacks<T, FLOW> == 8)
      if (vocab > kRow * 4) return go(element_warps_kernel<T, FLOW, true, 8>);
    return go(element_warps_kernel<T, FLOW, true, 4>);
  }
  if (vocab <= kRow) return go(element_warps_kernel<T, FLOW, false, 1>);
  return go(element_warps_kernel<T, FLOW, false, 4>);
}

template <typename T, bool FLOW, bool ALIGNED>
int run_blocks(ElementCall& call) {
  ElementArgs& a = call.args;
  const int64_t sms = call.props.sm_count;
  if (a.rows >= sms || a.vocab <= kPieceElements) {
    const auto go = [&](auto kernel, int threads) { return launch_blocks(kernel, call, threads, a.rows); };
    if constexpr (ALIGNED) {
      constexpr int kHeld = FLOW ? 2 : 4;
      const int64_t packs = a.vocab / Pack<T>::N;
      if (packs <= 128 * kHeld) return go(element_held_kernel<T, FLOW, 128, kHeld>, 128);
      if (packs <= 256 * kHeld) return go(element_held_kernel<T, FLOW, 256, kHeld>, 256);
      if (packs <= 512 * kHeld) return go(element_held_kernel<T, FLOW, 512, kHeld>, 512);
      if (packs <= 1024 * kHeld) return go(element_held_kernel<T, FLOW, 1024, kHeld>, 1024);
      if (a.vocab * int64_t(2 * sizeof(T)) > kLargeRowBytes)
        return go(element_rows_kernel<T, FLOW, true, 1024>, 1024);
    }
    return go(element_rows_kernel<T, FLOW, ALIGNED, 512>, 512);
  }
  const int64_t share = ceil_div<int64_t>(2 * sms, a.rows), worth = ceil_div<int64_t>(a.vocab, kPieceElements);
  const int64_t pieces = share < worth ? share : worth;
  a.pieces_per_row = int(pieces < kMostPieces ? pieces : kMostPieces);
  const unsigned blocks = unsigned(a.rows * a.pieces_per_row);
  element_pieces_kernel<T, FLOW, ALIGNED><<<blocks, kStreamThreads, 0, call.stream>>>(a);
  FXFUSE_CHECK_LAUNCH();
  FXFUSE_CHECK(launch(call.props, true, element_pieces_write_kernel<T, FLOW, ALIGNED>, blocks, kStreamThreads, 0,
                      call.stream, a));
  return 0;
}

template <typename T, bool FLOW>
int run(ElementCall& call) {
  const int64_t most_packs = call.rows_aligned ? kMostWarpPacks<T, FLOW> : 4;
  if (call.args.vocab <= kWarp * Pack<T>::N * most_packs) return run_warps<T, FLOW>(call);
  return call.together ? run_blocks<T, FLOW, true>(call) : run_blocks<T, FLOW, false>(call);
}


}  // namespace

// Bytes of scratch that fxfuse_distillation_elements needs on a device.
FXFUSE_API int fxfuse_distillation_elements_scratch(int device, int64_t* bytes) {
  FXFUSE_ON_DEVICE(device, props);
  *bytes = 3 * int64_t(props->sm_count) * int64_t(sizeof(ElementState<float, true>));
  return 0;
}

// student, teacher and what has their shape: dense [rows, vocab], rows and vocab > 0, temperatures > 0.
// Forward: `loss` of every element, grad and gradients null. Backward: loss null; `grad` what reaches every element
// (one element for all of them unless grad_is_vector), grad_student and grad_teacher (one may be null).
FXFUSE_API int fxfuse_distillation_elements(const void* student, const void* teacher, const void* grad, void* loss,
                                            void* grad_student, void* grad_teacher, void* scratch, int64_t rows,
                                            int64_t vocab, double student_temperature, double teacher_temperature,
                                            double scale, int grad_is_vector, int log_target, int dtype, int device,
                                            void* stream) {
  if (rows <= 0 || vocab <= 0 || (loss == nullptr) == (grad == nullptr)) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(device, props);
  ElementCall call{
      ElementArgs{student, teacher, grad, loss, grad_student, grad_teacher, scratch, rows, vocab,
                  student_temperature, teacher_temperature, scale, Exponential::of(teacher_temperature), 1,
                  grad_is_vector != 0, log_target != 0, Scales{Scale::of(teacher_temperature), Scale::of(student_temperature)}},
      *props, static_cast<cudaStream_t>(stream), false, false};
  const auto offset = [](const void* p) { return reinterpret_cast<uintptr_t>(p) & 15; };
  const auto meets = [&](const void* p) { return p == nullptr || offset(p) == offset(student); };
  call.together = meets(teacher) && meets(loss) && meets(grad_student) && meets(grad_teacher) &&
                  (grad_is_vector == 0 || meets(grad));
  const int element = dtype == kFloat32 ? 4 : 2;
  call.rows_aligned = call.together && offset(student) == 0 && vocab * element % 16 == 0;
  FXFUSE_DISPATCH(dtype, scalar_t, {
    return loss != nullptr ? run<scalar_t, false>(call) : run<scalar_t, true>(call);
  });
  return 0;
}
