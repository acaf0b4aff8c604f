// The online softmax of two rows at once, with the sum that couples them.
//
// In base 2, u = (t - mt) log2(e) / Tt and w = (s - ms) log2(e) / Ts, where mt, ms are the largest logits so far. One
// pass keeps
//     zt = sum 2^u      zs = sum 2^w      d = sum 2^u (u - w)
// from which   KL / ln 2 = d / zt - log2 zt + log2 zs,   q = 2^u / zt,   p = 2^w / zs.
// When the maxima move, and u by du, w by dw (not positive):  d <- 2^du (d + zt (du - dw)),  z <- 2^dz z.
// Because u and w are relative to the maxima, a common offset of the logits costs no digits.
#pragma once

#include "kl_div_point.cuh"
#include "packs.cuh"

namespace fxfuse {

constexpr float kLowest = -1e30f;  // below every scaled logit; finite, so that differences of maxima are

// The lowest log2 q that eager's softmax still stores as more than zero.
template <typename T> __device__ constexpr float kSmallestLog2 = -150.f;
template <> __device__ constexpr float kSmallestLog2<__half> = -25.f;
template <> __device__ constexpr float kSmallestLog2<__nv_bfloat16> = -134.f;

// Whether T needs the minima of every row (float16 does, to see overflow); teacher gradients need them in any dtype.
template <typename T> __device__ constexpr bool kNeedsMinima = false;
template <> __device__ constexpr bool kNeedsMinima<__half> = true;

// Half types keep exponentials as float16 (see KeptPack), which has its digits between 2^-14 and 2^15: all their
// distances are this much larger. It is in zt, zs and d alike and cancels wherever they are used.
constexpr float kHalfHeadroom = 14.f;

// log2(e) over a temperature, and the distance of a logit from a maximum in base 2: one fused multiply-add, with what a
// row subtracts rounded once. Sums over different maxima are brought together by the difference of those rounded terms,
// so that their rounding (large where logits or 1 / T are) is the same everywhere and cancels.
struct Scale {
  float factor;

  static Scale of(double temperature) { return {float(1.4426950408889634074 / temperature)}; }
  template <typename T>
  __device__ __forceinline__ float bias(float max) const {
    const float scaled = __fmul_rn(max, factor);  // never to be fused with what follows
    return sizeof(T) == 4 ? -scaled : __fsub_rn(kHalfHeadroom, scaled);
  }
  template <typename T>
  __device__ __forceinline__ float distance(float x, float max) const { return fmaf(x, factor, bias<T>(max)); }
  // By how much distances change when the maximum does.
  template <typename T>
  __device__ __forceinline__ float shift(float old_max, float new_max) const {
    return __fsub_rn(bias<T>(new_max), bias<T>(old_max));
  }
};
struct Scales {
  Scale t, s;
};

// A pack that holds exponentials in the room of its logits: float as they are, half types in float16, whose 11 digits
// are three more than bfloat16's and as many as float16's own gradients have.
template <typename T>
struct KeptPack {
  __device__ __forceinline__ static void keep(Pack<T>& p, const float (&e)[Pack<T>::N]) {
    __half2* h = reinterpret_cast<__half2*>(&p.raw);
#pragma unroll
    for (int i = 0; i < Pack<T>::N / 2; ++i) h[i] = __floats2half2_rn(e[2 * i], e[2 * i + 1]);
  }
  __device__ __forceinline__ static float get(const Pack<T>& p, int i) {
    return __half2float(reinterpret_cast<const __half*>(&p.raw)[i]);
  }
};
template <>
struct KeptPack<float> {
  __device__ __forceinline__ static void keep(Pack<float>& p, const float (&e)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p.at[i] = e[i];
  }
  __device__ __forceinline__ static float get(const Pack<float>& p, int i) { return p.at[i]; }
};

struct RowState {
  float mt = kLowest, ms = kLowest;    // maxima
  float zt = 0, zs = 0, d = 0;
  float zt_low = 0, zs_low = 0, d_low = 0;  // what float leaves of the joined sums: d / zt and the logarithms cancel
  float lt = -kLowest, ls = -kLowest;  // minima: where float16 overflows and where q vanishes

  // SPLIT, for gradients of the teacher: zt and d take what lies within a factor of two of the maximum, zt_low and d_low
  // the rest. Where one q is nearly 1, its gradient is what the others leave of it, and nothing of them may be lost.
  template <typename T, bool SPLIT = false>
  __device__ __forceinline__ void move_maxima(float new_mt, float new_ms, Scales c) {
    const float du = c.t.shift<T>(mt, new_mt), dw = c.s.shift<T>(ms, new_ms);
    const float ft = exp2_fast(du);
    if constexpr (SPLIT) {
      const float sum_t = zt + zt_low, sum_d = d + d_low;
      d_low = sum_t == 0.f ? sum_d : ft * fmaf(sum_t, du - dw, sum_d);
      zt_low = sum_t * ft;
      zt = d = 0.f;
    } else {
      d = zt == 0.f ? d : ft * fmaf(zt, du - dw, d);
      zt *= ft;
    }
    zs *= exp2_fast(dw);
    mt = new_mt;
    ms = new_ms;
  }
  // A pair of logits under maxima that are at least theirs; afterwards s and t are 2^w and 2^u.
  template <typename T, bool LOG_TARGET, bool SPLIT = false>
  __device__ __forceinline__ void add(float& s, float& t, Scales c) {
    const float u = c.t.distance<T>(t, mt), w = c.s.distance<T>(s, ms);
    t = exp2_fast(u);
    s = exp2_fast(w);
    zs += s;
    // A teacher logit of -inf counts nothing as a probability (0 log 0 = 0) and is NaN as a log-probability.
    const float uw = (LOG_TARGET ? u : fmaxf(u, kLowest)) - w;
    if constexpr (SPLIT) {
      constexpr float kOne = sizeof(T) == 4 ? 1.f : float(1 << int(kHalfHeadroom));
      const float large = t >= kOne / 2 ? kOne : 0.f, rest = t - large;
      zt += large;
      zt_low += rest;
      d = fmaf(large, uw, d);
      d_low = fmaf(rest, uw, d_low);
    } else {
      zt += t;
      d = fmaf(t, uw, d);
    }
  }
  template <typename T, bool LOG_TARGET, bool SPLIT = false>
  __device__ __forceinline__ void add(const Pack<T>& s, const Pack<T>& t, Scales c) {
#pragma unroll
    for (int i = 0; i < Pack<T>::N; ++i) {
      float sv = s.get(i), tv = t.get(i);
      add<T, LOG_TARGET, SPLIT>(sv, tv, c);
    }
  }
  // The same, leaving the exponentials in place of the logits, so that gradients of the student need no more of them.
  template <typename T, bool LOG_TARGET>
  __device__ __forceinline__ void add_and_keep(Pack<T>& s, Pack<T>& t, Scales c) {
    float es[Pack<T>::N], et[Pack<T>::N];
#pragma unroll
    for (int i = 0; i < Pack<T>::N; ++i) {
      es[i] = s.get(i);
      et[i] = t.get(i);
      add<T, LOG_TARGET>(es[i], et[i], c);
    }
    KeptPack<T>::keep(s, es);
    KeptPack<T>::keep(t, et);
  }
  // Joins the states of LANES neighbouring lanes; every lane gets the result, by the same operations in the same order.
  // teacher: its gradient is wanted.
  template <typename T, int LANES = kWarp>
  __device__ __forceinline__ void join_lanes(Scales c, bool teacher) {
    const float new_mt = warp_reduce<LANES>(mt, MaxNumber{}), new_ms = warp_reduce<LANES>(ms, MaxNumber{});
    if (sizeof(T) == 4 || teacher) {
      double sums[3];
      moved<T>(new_mt, new_ms, c, sums);
      set_sums(new_mt, new_ms, warp_sum<LANES>(sums[0]), warp_sum<LANES>(sums[1]), warp_sum<LANES>(sums[2]));
    } else {
      move_maxima<T>(new_mt, new_ms, c);
      zt = warp_sum<LANES>(zt);
      zs = warp_sum<LANES>(zs);
      d = warp_sum<LANES>(d);
    }
    join_minima<T, LANES>(teacher);
  }
  // The same in float. Enough where the sums only scale gradients, and for lanes of a row that hundreds of warps share,
  // whose errors average out.
  template <typename T, int LANES = kWarp>
  __device__ __forceinline__ void join_lanes_in_float(Scales c) {
    move_maxima<T>(warp_reduce<LANES>(mt, MaxNumber{}), warp_reduce<LANES>(ms, MaxNumber{}), c);
    zt = warp_sum<LANES>(zt);
    zs = warp_sum<LANES>(zs);
    d = warp_sum<LANES>(d);
    join_minima<T, LANES>(false);
  }
  template <typename T, int LANES>
  __device__ __forceinline__ void join_minima(bool teacher) {
    if (kNeedsMinima<T> || teacher) {
      lt = warp_reduce<LANES>(lt, MinNumber{});
      ls = warp_reduce<LANES>(ls, MinNumber{});
    }
  }
  // Takes in the state of another part of the row.
  template <typename T>
  __device__ __forceinline__ void join(const RowState& other, Scales c) {
    const float new_mt = fmaxf(mt, other.mt), new_ms = fmaxf(ms, other.ms);
    double mine[3], theirs[3];
    moved<T>(new_mt, new_ms, c, mine);
    other.moved<T>(new_mt, new_ms, c, theirs);
    set_sums(new_mt, new_ms, mine[0] + theirs[0], mine[1] + theirs[1], mine[2] + theirs[2]);
    lt = fminf(lt, other.lt);
    ls = fminf(ls, other.ls);
  }
  // zt, zs, d under other maxima, in double.
  template <typename T>
  __device__ __forceinline__ void moved(float new_mt, float new_ms, Scales c, double (&sums)[3]) const {
    const float du = c.t.shift<T>(mt, new_mt), dw = c.s.shift<T>(ms, new_ms);
    const double ft = exp2_fast(du), wide_t = double(zt) + double(zt_low);
    sums[0] = wide_t * ft;
    sums[1] = (double(zs) + double(zs_low)) * double(exp2_fast(dw));
    const double wide_d = double(d) + double(d_low);
    sums[2] = wide_t == 0. ? wide_d : ft * (wide_d + wide_t * double(du - dw));
  }
  __device__ __forceinline__ void set_sums(float new_mt, float new_ms, double sum_t, double sum_s, double sum_d) {
    mt = new_mt;
    ms = new_ms;
    zt = float(sum_t);
    zs = float(sum_s);
    d = float(sum_d);
    zt_low = float(sum_t - double(zt));
    zs_low = float(sum_s - double(zs));
    d_low = float(sum_d - double(d));
  }
  struct MaxNumber {  // passes over NaN
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  };
  struct MinNumber {
    __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
  };

  // False: the row must be done as eager does it. Something (g too, the gradient that reaches the row) is infinite, NaN
  // or outside what T stores.
  template <typename T>
  __device__ __forceinline__ bool plain(Scales c, float g) const {
    bool ok = fabsf(g) < kInf && zt > 0.f && zs > 0.f && zt < kInf && zs < kInf && fabsf(d) < kInf;
    if constexpr (kNeedsMinima<T>) {
      const float limit = 65000.f * kLog2e;  // float16 overflows at 65520
      const float high_t = mt * c.t.factor, low_t = lt * c.t.factor, high_s = ms * c.s.factor, low_s = ls * c.s.factor;
      ok = ok && high_t < limit && high_s < limit && low_t > -limit && low_s > -limit && high_t - low_t < limit &&
           high_s - low_s < limit;
    }
    return ok;
  }
};

// A row's loss from its sums.
__device__ __forceinline__ double row_loss(double zt, double zs, double d) {
  return (d / zt - log2(zt) + log2(zs)) * 0.6931471805599453094;
}

// Row losses of one warp. Logarithms in double take a microsecond, so a row is only noted, by one lane, and every 32
// rows the lanes work out one each.
struct LossQueue {
  double sum = 0;
  double zt = 0, zs, d;  // zt = 0: nothing noted
  int noted = 0;

  __device__ __forceinline__ void push(const RowState& row) {
    if (int(threadIdx.x) % kWarp == noted) {
      zt = double(row.zt) + double(row.zt_low);
      zs = double(row.zs) + double(row.zs_low);
      d = double(row.d) + double(row.d_low);
    }
    if (++noted == kWarp) flush();
  }
  __device__ __forceinline__ void flush() {
    if (zt != 0) sum += row_loss(zt, zs, d);
    zt = 0;
    noted = 0;
  }
  // The sum over the warp, to every lane.
  __device__ __forceinline__ double total() {
    flush();
    return warp_sum(sum);
  }
};

// The same in shared memory, for a warp that has no registers to spare. `noted` and `sum` start at 0.
struct SharedLossQueue {
  float2 zt[kWarp], zs[kWarp], d[kWarp];
  double sum;
  int noted;

  __device__ __forceinline__ void push(const RowState& row) {
    const int lane = int(threadIdx.x) % kWarp, at = noted;
    __syncwarp();
    if (lane == 0) {
      zt[at] = make_float2(row.zt, row.zt_low);
      zs[at] = make_float2(row.zs, row.zs_low);
      d[at] = make_float2(row.d, row.d_low);
      noted = at + 1;
    }
    __syncwarp();
    if (at + 1 == kWarp) flush();
  }
  __device__ __noinline__ void flush() {
    const int lane = int(threadIdx.x) % kWarp;
    const auto wide = [&](const float2& x) { return double(x.x) + double(x.y); };
    const double more = warp_sum(lane < noted ? row_loss(wide(zt[lane]), wide(zs[lane]), wide(d[lane])) : 0.);
    __syncwarp();
    if (lane == 0) {
      sum += more;
      noted = 0;
    }
    __syncwarp();
  }
  __device__ __forceinline__ double total() {
    flush();
    return sum;
  }
};

// The gradient that reaches each element's loss, and what it is over the temperatures: rounded once, as a whole row's
// gradient is wrong by what these are.
struct Incoming {
  float g = 1.f;
  float over_s = 0, over_t = 0;  // g / Ts, g ln 2 / Tt
};

// What the gradients of a row need, derived once from its state.
//   grad_student = (p - q) g / Ts                     = es * a_s - et * b_s
//   grad_teacher = q ((log q - log p) - KL) g / Tt    = et * b_t * ((u - w) - mean)
// Where a q is large, its u - w is near the mean, so the mean is kept in two floats; where one is nearly 1, the sums must
// hold as much (RowState::move_maxima).
struct RowGrads {
  float mt, ms, a_s, b_s, b_t = 0, mean = 0, mean_low = 0;
  Scales c;

  template <typename T, bool LOG_TARGET>
  __device__ __forceinline__ void prepare(const RowState& row, Scales scales, const Incoming& in, bool teacher) {
    c = scales;
    mt = row.mt;
    ms = row.ms;
    const float inverse_t = reciprocal(row.zt), inverse_s = reciprocal(row.zs);
    a_s = in.over_s * inverse_s;
    b_s = in.over_s * inverse_t;
    if (!teacher) return;
    b_t = in.over_t * inverse_t;  // u - w is in base 2
    const double wide = (double(row.d) + double(row.d_low)) / (double(row.zt) + double(row.zt_low));
    mean = float(wide);
    mean_low = float(wide - double(mean));
    // Eager's derivative of q log q is NaN where q is stored as 0, and the softmax spreads it over the row.
    if (!LOG_TARGET && c.t.distance<T>(row.lt, mt) - __log2f(row.zt) <= kSmallestLog2<T>)
      b_t = __int_as_float(0x7fffffff);
  }
  // 1 / z for the z of a softmax, which is at least about 1.
  __device__ __forceinline__ static float reciprocal(float z) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(z));
    return fmaf(r, fmaf(-z, r, 1.f), r);
  }
  template <typename T>
  __device__ __forceinline__ float student(float s, float t) const {
    return fmaf(exp2_fast(c.s.distance<T>(s, ms)), a_s, -(exp2_fast(c.t.distance<T>(t, mt)) * b_s));
  }
  template <typename T>
  __device__ __forceinline__ float teacher(float s, float t) const {
    const float u = c.t.distance<T>(t, mt), w = c.s.distance<T>(s, ms);
    return exp2_fast(u) * b_t * (((u - w) - mean) - mean_low);
  }
  // Gradients of a pack, to where they are wanted (an address may be null).
  template <typename T>
  __device__ __forceinline__ void write(const Pack<T>& s, const Pack<T>& t, T* to_s, T* to_t, bool aligned) const {
    if (to_s != nullptr) {
      Pack<T> p;
#pragma unroll
      for (int i = 0; i < Pack<T>::N; ++i) p.set(i, student<T>(s.get(i), t.get(i)));
      store_pack(to_s, p, aligned);
    }
    if (to_t != nullptr) {
      Pack<T> p;
#pragma unroll
      for (int i = 0; i < Pack<T>::N; ++i) p.set(i, teacher<T>(s.get(i), t.get(i)));
      store_pack(to_t, p, aligned);
    }
  }
  // Gradients of the student from exponentials kept under the maxima that a lane had then.
  template <typename T>
  __device__ __forceinline__ void write_kept(const Pack<T>& s, const Pack<T>& t, float lane_a, float lane_b,
                                             T* to) const {
    Pack<T> p;
#pragma unroll
    for (int i = 0; i < Pack<T>::N; ++i)
      p.set(i, fmaf(KeptPack<T>::get(s, i), lane_a, -(KeptPack<T>::get(t, i) * lane_b)));
    st_stream(to, p);
  }
  template <typename T>
  __device__ __forceinline__ void write_one(float s, float t, T* to_s, T* to_t) const {
    if (to_s != nullptr) st_one(to_s, student<T>(s, t));
    if (to_t != nullptr) st_one(to_t, teacher<T>(s, t));
  }
};

}  // namespace fxfuse
