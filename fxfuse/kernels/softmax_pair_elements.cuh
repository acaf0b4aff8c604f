// The loss of every element of two rows' softmaxes, and its gradients: what a pass over a row sums, and what a second one
// writes.
//
// With q (teacher) and p (student) the softmaxes, r = log q - log p and g the gradient that reaches an element:
//     loss         = scale q r
//     grad_student = scale (p A - q g) / Ts            A = sum q g
//     grad_teacher = scale q (g (r + 1) - B) / Tt      B = sum q g (r + 1)     (log_target or not)
// In the terms of softmax_pair.cuh (u, w: distances from the maxima in base 2; zt, zs: sums of 2^u, 2^w),
//     r = ln 2 ((u - w) + gap)      gap = log2(zs / zt)
// so that one pass finds zt, zs and, where gradients flow back, a = sum 2^u g and b = sum 2^u g (u - w):
//     A = a / zt      B = ln 2 (b + (gap + log2 e) a) / zt
#pragma once

#include "softmax_pair.cuh"

#include <type_traits>

namespace fxfuse {

// e^(d / T) of a distance d from a maximum, d not positive, within an ulp or so. The quotient is kept in two numbers, as an
// exponent of -20 that is rounded once costs a float two digits.
struct Exponential {
  float inverse, inverse_low;  // of T

  static Exponential of(double temperature) {
    const float inverse = float(1. / temperature);
    return {inverse, float(1. / temperature - double(inverse))};
  }
  __device__ __forceinline__ float operator()(float d) const {
    const float x = d * inverse, low = fmaf(d, inverse_low, fmaf(d, inverse, -x)), e = expf(x);
    return x < -104.f ? 0.f : fmaf(e, low, e);
  }
};

struct ElementArgs {
  const void* student;  // [rows, vocab], dense
  const void* teacher;
  const void* grad;  // of every element, or one element for all; null in a forward pass
  void* loss;        // null in a backward pass
  void* grad_student;
  void* grad_teacher;  // null where not wanted
  void* pieces;        // ElementState, one a piece
  int64_t rows, vocab;
  double temperature_s, temperature_t, scale;
  Exponential exponential_t;
  int pieces_per_row;
  bool grad_is_vector, log_target;
  Scales scales;
};

// Gradients of the student are q g where g varies, and eager's float32 q (a softmax) is good to half an ulp or so; what
// the special function unit gives is not. Elsewhere q stands beside terms that eager rounds more than that.
template <typename T, bool FLOW> constexpr bool kExactTeacher = FLOW && sizeof(T) == 4;

// The sums of a row. FLOW: of a backward pass, with those that the gradients need.
template <typename T, bool FLOW>
struct ElementState {
  RowState row;
  float a = 0, b = 0;
  float most_g = 0;  // largest |g|: where float16 overflows

  // What sums under the old maxima are multiplied by.
  __device__ __forceinline__ float factor_t(float new_mt, const ElementArgs& args) const {
    if constexpr (kExactTeacher<T, FLOW>) return args.exponential_t(row.mt - new_mt);
    else return exp2_fast(args.scales.t.template shift<T>(row.mt, new_mt));
  }
  __device__ __forceinline__ float factor_s(float new_ms, const ElementArgs& args) const {
    return exp2_fast(args.scales.s.template shift<T>(row.ms, new_ms));
  }
  // By how much more the distances of the teacher change than those of the student.
  __device__ __forceinline__ float relative_shift(float new_mt, float new_ms, Scales c) const {
    return c.t.template shift<T>(row.mt, new_mt) - c.s.template shift<T>(row.ms, new_ms);
  }
  __device__ __forceinline__ void move_maxima(float new_mt, float new_ms, const ElementArgs& args) {
    const float ft = factor_t(new_mt, args), shift = relative_shift(new_mt, new_ms, args.scales);
    if (row.zt != 0.f) {
      row.d = ft * fmaf(row.zt, shift, row.d);
      row.zt *= ft;
      if constexpr (FLOW) {
        b = ft * fmaf(a, shift, b);
        a *= ft;
      }
    }
    row.zs *= factor_s(new_ms, args);
    row.mt = new_mt;
    row.ms = new_ms;
  }
  // Under maxima that are at least the logits'. `lowest`: see lowest_distance. STUDENT: no gradient but its is wanted,
  // which asks for neither b nor d.
  template <bool STUDENT>
  __device__ __forceinline__ void add(float s, float t, float g, float lowest, const ElementArgs& args) {
    const Scales& c = args.scales;
    const float u = c.t.template distance<T>(t, row.mt), w = c.s.template distance<T>(s, row.ms);
    float e;
    if constexpr (kExactTeacher<T, FLOW>) e = args.exponential_t(t - row.mt);
    else e = exp2_fast(u);
    row.zs += exp2_fast(w);
    row.zt += e;
    const float uw = fmaxf(u, lowest) - w, eg = FLOW ? e * g : 0.f;
    if constexpr (!STUDENT) row.d = fmaf(e, uw, row.d);  // not used but to see inf and NaN
    if constexpr (FLOW) {
      a += eg;
      if constexpr (!STUDENT) b = fmaf(eg, uw, b);
      if constexpr (kNeedsMinima<T>) most_g = fmaxf(most_g, fabsf(g));
    }
  }
  template <int COUNT>
  __device__ __forceinline__ void take(const Pack<T> (&s)[COUNT], const Pack<T> (&t)[COUNT], const Pack<T> (&g)[COUNT],
                                       float constant, float lowest, const ElementArgs& args) {
    PackExtreme<T, true> most_s(s[0]), most_t(t[0]);
#pragma unroll
    for (int k = 1; k < COUNT; ++k) {
      most_s.take(s[k]);
      most_t.take(t[k]);
    }
    if constexpr (FLOW || kNeedsMinima<T>) {
      PackExtreme<T, false> least_s(s[0]), least_t(t[0]);
#pragma unroll
      for (int k = 1; k < COUNT; ++k) {
        least_s.take(s[k]);
        least_t.take(t[k]);
      }
      row.ls = fminf(row.ls, least_s.get());
      row.lt = fminf(row.lt, least_t.get());
    }
    const float max_t = fmaxf(row.mt, most_t.get()), max_s = fmaxf(row.ms, most_s.get());
    if (max_t != row.mt || max_s != row.ms) move_maxima(max_t, max_s, args);
    const auto add_all = [&](auto student) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k)
#pragma unroll
        for (int i = 0; i < Pack<T>::N; ++i)
          add<decltype(student)::value>(s[k].get(i), t[k].get(i), FLOW && args.grad_is_vector ? g[k].get(i) : constant,
                                        lowest, args);
    };
    if (FLOW && args.grad_teacher == nullptr) add_all(std::true_type{});
    else add_all(std::false_type{});
  }
  __device__ __forceinline__ void take_lone(float s, float t, float g, float lowest, const ElementArgs& args) {
    row.ls = fminf(row.ls, s);
    row.lt = fminf(row.lt, t);
    const float max_t = fmaxf(row.mt, t), max_s = fmaxf(row.ms, s);
    if (max_t != row.mt || max_s != row.ms) move_maxima(max_t, max_s, args);
    add<false>(s, t, g, lowest, args);
  }
  // Joins the states of LANES neighbouring lanes; every lane gets the result. In double for float32.
  template <int LANES = kWarp>
  __device__ __forceinline__ void join_lanes(const ElementArgs& args) {
    using Wide = std::conditional_t<sizeof(T) == 4, double, float>;
    const float new_mt = warp_reduce<LANES>(row.mt, RowState::MaxNumber{});
    const float new_ms = warp_reduce<LANES>(row.ms, RowState::MaxNumber{});
    const Wide ft = factor_t(new_mt, args), shift = relative_shift(new_mt, new_ms, args.scales);
    const Wide zt = Wide(row.zt) + Wide(row.zt_low);
    if constexpr (FLOW) {
      b = float(warp_sum<LANES>(row.zt == 0.f ? Wide(b) : ft * (Wide(b) + Wide(a) * shift)));
      a = float(warp_sum<LANES>(ft * Wide(a)));
      if constexpr (kNeedsMinima<T>) most_g = warp_reduce<LANES>(most_g, RowState::MaxNumber{});
    }
    row.d = warp_sum<LANES>(row.zt == 0.f ? row.d : float(ft) * fmaf(row.zt, float(shift), row.d));
    row.zs = warp_sum<LANES>(row.zs * factor_s(new_ms, args));
    const Wide new_zt = warp_sum<LANES>(ft * zt);
    row.zt = float(new_zt);
    row.zt_low = float(new_zt - Wide(row.zt));
    row.mt = new_mt;
    row.ms = new_ms;
    row.join_minima<T, LANES>(true);
  }
  // False: the row must be done as eager does it.
  __device__ __forceinline__ bool plain(const ElementArgs& args) const {
    bool ok = row.plain<T>(args.scales, 1.f);
    if constexpr (FLOW) {
      ok = ok && fabsf(a) < kInf && (args.grad_teacher == nullptr || fabsf(b) < kInf);
      if constexpr (kNeedsMinima<T>) {
        // No |g (log q + 1 - log p)| is larger than this; in base 2, and with room for the logarithms of the sums.
        const Scales& c = args.scales;
        const float spread = (row.mt - row.lt) * c.t.factor + (row.ms - row.ls) * c.s.factor + 64.f;
        ok = ok && most_g * fmaxf(1.f, fabsf(float(args.scale))) * spread < 65000.f;
      }
    }
    return ok;
  }
};

// A teacher logit of -inf counts nothing as a probability (0 log 0 = 0) and is NaN as a log-probability.
__device__ __forceinline__ float lowest_distance(bool log_target) { return log_target ? -kInf : kLowest; }

// What the results of a row need, derived once from its sums.
template <typename T, bool FLOW>
struct ElementResults {
  float mt, ms, gap;
  float k;                              // forward: loss = 2^u k ((u - w) + gap)
  float a_s, b_s, b_t, mean, mean_low;  // backward
  bool plain;

  __device__ __forceinline__ static ElementResults of(const ElementState<T, FLOW>& state, const ElementArgs& args) {
    ElementResults r;
    r.derive(state, args);
    return r;
  }
  __device__ __forceinline__ void derive(const ElementState<T, FLOW>& state, const ElementArgs& args) {
    const RowState& row = state.row;
    const Scales& c = args.scales;
    mt = row.mt;
    ms = row.ms;
    plain = state.plain(args);
    if (!plain) return;
    gap = log2f(row.zs * RowGrads::reciprocal(row.zt));
    if constexpr (!FLOW) {
      k = float(args.scale) * kLn2 * RowGrads::reciprocal(row.zt);
    } else {
      // Every coefficient is rounded once: what it is wrong by, the whole row is.
      using Wide = std::conditional_t<sizeof(T) == 4, double, float>;
      const Wide zt = Wide(row.zt) + Wide(row.zt_low), inverse_t = Wide(1) / zt, scale = Wide(args.scale);
      // u is of a rounded product with the maximum, the exact exponentials are not.
      if constexpr (kExactTeacher<T, FLOW>) gap -= fmaf(mt, c.t.factor, c.t.template bias<T>(mt));
      gap += kLog2e;  // (r + 1) / ln 2 = (u - w) + gap
      const Wide over_s = scale / Wide(args.temperature_s) * inverse_t;
      a_s = float(over_s * Wide(state.a) / Wide(row.zs));
      b_s = float(over_s);
      if (args.grad_teacher == nullptr) return;
      b_t = float(scale * Wide(0.6931471805599453094) / Wide(args.temperature_t) * inverse_t);
      const Wide wide = (Wide(state.b) + Wide(gap) * Wide(state.a)) * inverse_t;
      mean = float(wide);
      mean_low = float(wide - Wide(mean));
      // Eager's derivative of q log q is NaN where q is stored as 0, and the softmax spreads it over the row.
      if (!args.log_target && c.t.template distance<T>(row.lt, mt) - __log2f(row.zt) <= kSmallestLog2<T>)
        b_t = __int_as_float(0x7fffffff);
    }
  }
  __device__ __forceinline__ float exponential(const ElementArgs& args, float t) const {  // of the teacher
    if constexpr (kExactTeacher<T, FLOW>) return args.exponential_t(t - mt);
    else return exp2_fast(args.scales.t.template distance<T>(t, mt));
  }
  __device__ __forceinline__ float distance(const ElementArgs& args, float s, float t) const {
    return fmaxf(args.scales.t.template distance<T>(t, mt), lowest_distance(args.log_target)) -
           args.scales.s.template distance<T>(s, ms);
  }
  __device__ __forceinline__ float loss(const ElementArgs& args, float s, float t) const {
    return exponential(args, t) * k * (distance(args, s, t) + gap);
  }
  // e: the teacher's exponential.
  __device__ __forceinline__ float student(const ElementArgs& args, float s, float e, float g) const {
    return fmaf(exp2_fast(args.scales.s.template distance<T>(s, ms)), a_s, -(e * b_s * g));
  }
  __device__ __forceinline__ float teacher(const ElementArgs& args, float s, float t, float e, float g) const {
    return e * b_t * (fmaf(g, distance(args, s, t) + gap, -mean) - mean_low);
  }
};

}  // namespace fxfuse
