// KL divergence between two softmaxes, fused from the logits on: loss, and gradients in the same call.
//
//   loss = scale * factor * sum_rows KL(softmax(teacher / Tt) || softmax(student / Ts))
//
// Four roads, chosen by the length of a row (softmax_pair.cuh has the algebra they share):
//   short      a warp holds a row in registers                                       distillation_rows.cuh
//   resident   a block, or a cluster of blocks, holds a row in shared memory          distillation_resident.cuh
//   ring       a cluster holds a row in registers, the next ones in shared memory     distillation_ring.cuh
//   stream     rows split over the device; gradients read the logits a second time   distillation_stream.cuh
#include "distillation_resident.cuh"
#include "distillation_ring.cuh"
#include "distillation_stream.cuh"
#include "finish.cuh"

#include <atomic>

namespace {

using namespace fxfuse;

enum Road : int { kAuto = 0, kShort = 1, kResident = 2, kStream = 3, kRing = 4 };

// Without gradients nothing need be held: rows of more bytes than this are read as a stream.
constexpr int64_t kStreamBytes = 32768;
// With gradients, on Hopper: rows of more bytes than this (and of more than one row) go through the ring.
constexpr int64_t kRingBytes = 49152;

// Hopper's copy engine is slower where a copy starts off a line of 128 bytes, so shares of rows are whole lines.
constexpr int64_t kCopyPacks = 8;

struct Call {
  DistillArgs args;
  const DeviceProps& props;
  cudaStream_t stream;
  bool log_target;
  bool grads;
  bool together;  // 16-byte boundaries fall on the same elements of every tensor
  bool rows_aligned;
  int device;
};

// Fails over to cudaErrorNotSupported where the road cannot take the call.
template <typename T, bool LOG_TARGET, int PACKS, bool ALIGNED>
int launch_short(const Call& call, int* partials) {
  constexpr int kRowsPerBlock = kWarpRowThreads / kWarp;
  const auto kernel = warp_rows_kernel<T, LOG_TARGET, PACKS, ALIGNED>;
  static int resident = 0;
  if (resident == 0) {
    int blocks = 0;
    FXFUSE_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kWarpRowThreads, 0));
    resident = blocks;
  }
  const int64_t useful = ceil_div<int64_t>(call.args.rows, kRowsPerBlock);
  const int64_t most = int64_t(call.props.sm_count) * resident;
  const int blocks = int(useful < most ? useful : most < kMaxPartials ? most : kMaxPartials);
  kernel<<<blocks, kWarpRowThreads, 0, call.stream>>>(call.args);
  FXFUSE_CHECK_LAUNCH();
  *partials = blocks;
  return 0;
}

template <typename T, bool LOG_TARGET>
int run_short(const Call& call, int* partials) {
  constexpr int kRow = kWarp * Pack<T>::N;
  const int64_t vocab = call.args.vocab;
  if (call.rows_aligned) {
    if (vocab <= kRow) return launch_short<T, LOG_TARGET, 1, true>(call, partials);
    if (vocab <= kRow * 2) return launch_short<T, LOG_TARGET, 2, true>(call, partials);
    if constexpr (sizeof(T) == 4)
      if (vocab > kRow * 4) return launch_short<T, LOG_TARGET, 8, true>(call, partials);
    return launch_short<T, LOG_TARGET, 4, true>(call, partials);
  }
  if (vocab <= kRow) return launch_short<T, LOG_TARGET, 1, false>(call, partials);
  return launch_short<T, LOG_TARGET, 4, false>(call, partials);
}

// Launches `kernel` as groups of `cluster` blocks, as many as run at a time and the rows can use.
template <typename Kernel, typename Plan>
int launch_groups(Kernel kernel, const Plan& plan, int threads, const Call& call, int* partials) {
  FXFUSE_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem_bytes));
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(plan.smem_bytes);
  config.stream = call.stream;
  int64_t most = 0;
  if (plan.cluster > 1) {
    if (plan.cluster > 8)
      FXFUSE_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    config.gridDim = dim3(plan.cluster);
    int clusters = 0;
    FXFUSE_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    most = clusters;
  } else {
    int blocks = 0;
    FXFUSE_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, plan.smem_bytes));
    most = int64_t(blocks) * call.props.sm_count;
  }
  if (most == 0) return int(cudaErrorNotSupported);
  if (most > kMaxPartials) most = kMaxPartials;
  const int64_t groups = call.args.rows < most ? call.args.rows : most;
  config.gridDim = dim3(unsigned(groups * plan.cluster));
  FXFUSE_CHECK(cudaLaunchKernelEx(&config, kernel, call.args, plan));
  *partials = int(groups);
  return 0;
}

// How a row is laid over shared memory. False where it does not fit.
template <typename T>
bool plan_resident(const Call& call, ResidentPlan& plan) {
  if (!call.together) return false;
  const bool hopper = is_hopper(call.props);
  const int64_t packs = call.args.vocab / Pack<T>::N;
  const auto bytes = [&](int cluster) {
    const int warps = plan.threads / kWarp;
    plan.packs_per_warp = int(ceil_div<int64_t>(packs, int64_t(cluster) * warps));
    if (hopper && plan.packs_per_warp > 8 * kCopyPacks)
      plan.packs_per_warp = int(ceil_div<int64_t>(plan.packs_per_warp, kCopyPacks) * kCopyPacks);
    return int64_t(plan.packs_per_warp) * warps * 2 * 16;
  };
  const int64_t room = call.props.smem_per_block - 3072;           // one block an SM
  const int64_t third = call.props.smem_per_sm / 3 - 3072;         // three: one computes while others wait for memory
  const int64_t half = call.props.smem_per_sm / 2 - 3072;
  const int most = hopper ? kMostCluster : 1;
  plan.cluster = 0;
  for (const int64_t limit : {third, half, room}) {
    for (int cluster = 1; cluster <= most && plan.cluster == 0; cluster *= 2)
      if (bytes(cluster) <= limit) plan.cluster = cluster;
    if (plan.cluster != 0) break;
  }
  if (plan.cluster == 0) return false;
  // Few rows: spread each over more blocks while a block's share stays worth its launch.
  while (plan.cluster < most && call.args.rows * plan.cluster * 2 <= call.props.sm_count * 3 &&
         bytes(plan.cluster) > 16384)
    plan.cluster *= 2;
  if (plan.cluster == 1 && bytes(1) <= call.props.smem_per_sm / 6 - 3072) plan.threads = kResidentThreads / 2;
  const int64_t row_bytes = bytes(plan.cluster);
  plan.stages = row_bytes * 2 <= call.props.smem_per_sm / 3 - 3072 ? 2 : 1;
  plan.smem_bytes = int(row_bytes * plan.stages);
  // Synccheck fails where clusters of sixteen meet on a multiprocessor, of whatever kernel that has mbarriers.
  if (plan.cluster == kMostCluster && followed()) plan.smem_bytes = int(room);
  return true;
}

template <typename T, bool LOG_TARGET, bool HOPPER>
int launch_resident(const Call& call, const ResidentPlan& plan, int* partials) {
  constexpr int kFew = kResidentThreads / 2;
  const auto few = resident_kernel<T, LOG_TARGET, HOPPER, kFew>;
  const auto all = resident_kernel<T, LOG_TARGET, HOPPER, kResidentThreads>;
  return launch_groups(plan.threads == kFew ? few : all, plan, plan.threads, call, partials);
}

// A ring kernel as it would be launched: the cluster that leaves the fewest rounds of rows, the largest of these.
struct RingLaunch {
  RingPlan plan;
  int groups = 0;
  int64_t rounds = 0;
};

// Clusters of `size` blocks that run at a time on the current device; asked of the driver once.
template <auto KERNEL>
cudaError_t ring_clusters(int device, int size, int smem_bytes, int* clusters) {
  static std::atomic<int> known[kMaxDevices][kRingMostCluster + 1];
  std::atomic<int>& slot = known[device][size];
  if (slot.load(std::memory_order_relaxed) == 0) {
    // No more shared memory than that: what is left is the L1 that spilled registers need.
    cudaError_t error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size);
    config.blockDim = dim3(kRingThreads);
    config.dynamicSmemBytes = size_t(smem_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int found = 0;
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&found, KERNEL, &config);
    if (error != cudaSuccess) return error;
    slot.store(found + 1, std::memory_order_relaxed);
  }
  *clusters = slot.load(std::memory_order_relaxed) - 1;
  return cudaSuccess;
}

template <int PACKS> constexpr int kRingSlotBytes = 2 * PACKS * kRingThreads * 16;
template <int PACKS> constexpr int kRingSlots = PACKS <= 8 ? 3 : 2;

template <auto KERNEL, int CHUNKS, int PACKS>
cudaError_t plan_ring(const Call& call, int64_t packs, RingLaunch& best) {
  constexpr int kChunk = PACKS * kRingThreads;
  for (int cluster = 1; cluster <= kRingMostCluster; ++cluster) {
    const int64_t share = ceil_div<int64_t>(packs, cluster * kCopyPacks) * kCopyPacks;
    if (share > CHUNKS * kChunk) continue;
    if (cluster > 1 && share < kChunk / 4) break;
    int clusters = 0;
    const cudaError_t error =
        ring_clusters<KERNEL>(call.device, cluster, kRingSlots<PACKS> * kRingSlotBytes<PACKS>, &clusters);
    if (error != cudaSuccess) return error;
    if (clusters == 0) continue;
    const int64_t rounds = ceil_div<int64_t>(call.args.rows, clusters);
    if (best.groups != 0 && rounds > best.rounds) continue;
    best.plan = {cluster, int(share), int(ceil_div<int64_t>(share, kChunk)), kRingSlots<PACKS>};
    best.groups = int(call.args.rows < clusters ? call.args.rows : clusters);
    best.rounds = rounds;
  }
  return cudaSuccess;
}

template <auto KERNEL, int PACKS>
int launch_ring(const Call& call, const RingLaunch& launch, int* partials) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = launch.plan.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.groups * launch.plan.cluster);
  config.blockDim = dim3(kRingThreads);
  config.dynamicSmemBytes = size_t(launch.plan.slots * kRingSlotBytes<PACKS>);
  config.stream = call.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  FXFUSE_CHECK(cudaLaunchKernelEx(&config, KERNEL, call.args, launch.plan));
  *partials = launch.groups * launch.plan.cluster;
  return 0;
}

// Two sizes of block shares: the larger has less of the next row under way, and is taken where it spares rounds.
template <typename T, bool LOG_TARGET, bool KEEP, bool FOLLOWED = false>
int run_ring(const Call& call, int* partials) {
  if constexpr (!FOLLOWED)
    if (followed()) return run_ring<T, LOG_TARGET, KEEP, true>(call, partials);
  constexpr auto kSmall = ring_kernel<T, LOG_TARGET, 2, 8, KEEP, FOLLOWED>;
  constexpr auto kLarge = ring_kernel<T, LOG_TARGET, 2, 10, KEEP, FOLLOWED>;
  const int64_t packs = call.args.vocab / Pack<T>::N;
  if (!call.together || !call.grads || !is_hopper(call.props)) return int(cudaErrorNotSupported);
  RingLaunch small, large;
  FXFUSE_CHECK((plan_ring<kSmall, 2, 8>(call, packs, small)));
  FXFUSE_CHECK((plan_ring<kLarge, 2, 10>(call, packs, large)));
  const bool spares = large.groups != 0 && (small.groups == 0 || large.rounds * 5 <= small.rounds * 4);
  if (spares) return launch_ring<kLarge, 10>(call, large, partials);
  if (small.groups != 0) return launch_ring<kSmall, 8>(call, small, partials);
  return int(cudaErrorNotSupported);
}

template <typename T, bool LOG_TARGET, bool ALIGNED>
int run_stream(const Call& call, int* partials) {
  const DistillArgs& a = call.args;
  const DeviceProps& props = call.props;
  constexpr int64_t kUnit = 64 * Pack<T>::N;  // elements; a block's share is cut no finer
  Deal deal;
  const int64_t units = ceil_div<int64_t>(a.vocab, kUnit);
  deal.per_row = int(units < 4096 ? units : 4096);
  deal.units = a.rows * deal.per_row;
  const int64_t worth = ceil_div<int64_t>(deal.units, 8);
  const int64_t most = int64_t(props.sm_count) * 4;
  deal.blocks = int(worth < most ? worth : most);
  const auto sums = a.grad_teacher != nullptr ? stream_sums_kernel<T, LOG_TARGET, ALIGNED, true>
                                              : stream_sums_kernel<T, LOG_TARGET, ALIGNED, false>;
  sums<<<deal.blocks, kStreamThreads, 0, call.stream>>>(a, deal);
  FXFUSE_CHECK_LAUNCH();
  const int64_t row_blocks = ceil_div<int64_t>(a.rows, kStreamWarps);
  const int blocks = int(row_blocks < props.sm_count * 4 ? row_blocks : props.sm_count * 4);
  FXFUSE_CHECK(launch(props, true, stream_rows_kernel<T, LOG_TARGET>, blocks, kStreamThreads, 0, call.stream, a, deal));
  *partials = blocks;
  if (call.grads) {
    stream_grads_kernel<T, LOG_TARGET, ALIGNED><<<deal.blocks, kStreamThreads, 0, call.stream>>>(a, deal);
    FXFUSE_CHECK_LAUNCH();
  }
  return 0;
}

template <typename T, bool LOG_TARGET>
int run(const Call& call, int road, int* partials) {
  const int64_t longest = warp_row_vocab<T>(call.rows_aligned);
  if (road == kShort || (road == kAuto && call.args.vocab <= longest)) {
    if (call.args.vocab > longest) return int(cudaErrorInvalidValue);
    return run_short<T, LOG_TARGET>(call, partials);
  }
  int code = int(cudaErrorNotSupported);
  const bool streams = !call.grads && call.args.vocab * int64_t(sizeof(T)) > kStreamBytes;
  if (road == kRing || (road == kAuto && call.grads && call.args.vocab * int64_t(sizeof(T)) > kRingBytes)) {
    const bool keep = call.args.grad_teacher == nullptr;
    if (keep) code = run_ring<T, LOG_TARGET, true>(call, partials);
    else if constexpr (sizeof(T) == 4) code = run_ring<T, LOG_TARGET, false>(call, partials);  // half types: slower
    if (code != int(cudaErrorNotSupported)) return code;
  }
  const bool hold = road == kResident || (road == kAuto && !streams);
  ResidentPlan plan;
  if (hold && plan_resident<T>(call, plan)) {
    code = is_hopper(call.props) ? launch_resident<T, LOG_TARGET, true>(call, plan, partials)
                                 : launch_resident<T, LOG_TARGET, false>(call, plan, partials);
  }
  if (code != int(cudaErrorNotSupported)) return code;
  if (road != kAuto && road != kStream) return int(cudaErrorInvalidValue);
  return call.together ? run_stream<T, LOG_TARGET, true>(call, partials)
                       : run_stream<T, LOG_TARGET, false>(call, partials);
}


}  // namespace

// Bytes of scratch that fxfuse_distillation_kl needs for so many rows.
FXFUSE_API int fxfuse_distillation_kl_scratch(int64_t rows, int64_t* bytes) {
  *bytes = int64_t(kMaxPartials) * sizeof(double) + (2 * rows + kStreamMaxBlocks) * int64_t(sizeof(RowState));
  return 0;
}

// student, teacher, gradients: dense [rows, vocab], rows and vocab > 0, temperatures > 0.
// `loss` (one element, may be null): scale * factor * the sum over rows.
// grad_student, grad_teacher (may be null): its gradients, times grad_output[0] where that is not null.
// road: 0 lets the library choose; 1 to 4 name one (tests and benchmarks), cudaErrorInvalidValue where it cannot.
FXFUSE_API int fxfuse_distillation_kl(const void* student, const void* teacher, const void* grad_output, void* loss,
                                      void* grad_student, void* grad_teacher, void* scratch, int64_t rows,
                                      int64_t vocab, double student_temperature, double teacher_temperature,
                                      double factor, double scale, int log_target, int road, int dtype, int device,
                                      void* stream) {
  if (rows <= 0 || vocab <= 0) return int(cudaErrorInvalidValue);
  FXFUSE_ON_DEVICE(device, props);
  double* const partial = static_cast<double*>(scratch);
  RowState* const states = reinterpret_cast<RowState*>(partial + kMaxPartials);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  Call call{DistillArgs{student, teacher, grad_output, grad_student, grad_teacher, loss != nullptr ? partial : nullptr,
                        states, states + rows, rows, vocab, student_temperature, teacher_temperature, scale, factor,
                        Scales{Scale::of(teacher_temperature), Scale::of(student_temperature)}},
            *props, s, log_target != 0, grad_student != nullptr || grad_teacher != nullptr, false, false, device};
  const auto offset = [](const void* p) { return reinterpret_cast<uintptr_t>(p) & 15; };
  const auto meets = [&](const void* p) { return p == nullptr || offset(p) == offset(student); };
  call.together = meets(teacher) && meets(grad_student) && meets(grad_teacher);
  const int element = dtype == kFloat32 ? 4 : 2;
  call.rows_aligned = call.together && offset(student) == 0 && vocab * element % 16 == 0;
  int partials = 0, code = 0;
  FXFUSE_DISPATCH(dtype, scalar_t, {
    code = log_target ? run<scalar_t, true>(call, road, &partials) : run<scalar_t, false>(call, road, &partials);
    if (code == 0 && loss != nullptr) FXFUSE_CHECK(finish<scalar_t>(*props, partial, partials, factor, scale, loss, s));
  });
  return code;
}
