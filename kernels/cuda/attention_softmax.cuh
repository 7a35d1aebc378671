// The online softmax (Milakov and Gimelshein, 2018): the running maximum and sum of each row, and how a row ends.
//
// Policy: the maximum is that of the stored scores and exact; weights are exp(logit_scale * (score - maximum)), where
// the difference comes first: equal scores of any size weigh exactly 1. A NaN score is passed over by the maximum and
// shows in the sum. A sink joins at the end.
#pragma once

#include "cuda/attention_scores.cuh"
#include "cuda/exp.cuh"

namespace transfuse::cuda {

// exp(scale * difference) for difference <= 0, <= 1 ULP, since the product is not rounded; below e^-88 it is 0.
__device__ __forceinline__ float exp_scaled(float difference, float scale) {
  const float x = difference * scale;
  const float rest = fmaf(difference, scale, -x);
  return exp_nonpositive(x, x > exp_lowest ? rest : 0.0f);
}

// Of the two rows of a fragment that a thread has; `sum` is the thread's own part until the end.
struct SoftmaxRows {
  float maximum[2], sum[2], anchor[2];  // maximum is relative to the anchor

  __device__ __forceinline__ SoftmaxRows() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[half] = -attention_infinity;
      sum[half] = anchor[half] = 0;
    }
  }
};

// Over the four lanes that share a row.
__device__ __forceinline__ float largest_of_row(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

template <int Keys>
__device__ __forceinline__ void row_maxima(const ScoreFragment<Keys>& scores, float (&maxima)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = fmaxf(scores.x[0][2 * half], scores.x[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < Keys / 8; ++n)
      most = fmaxf(most, fmaxf(scores.x[n][2 * half], scores.x[n][2 * half + 1]));
    maxima[half] = largest_of_row(most);
  }
}

__device__ __forceinline__ bool is_saturated(float maximum, float logit_scale) {
  const float size = fabsf(maximum) * logit_scale;
  return size > saturated_logit && size < attention_infinity;
}

// Whether a row wants its scores refined: the largest of this block is saturated, or earlier ones are relative to an
// anchor. Not where that is padding by a large finite value: far below the running maximum every weight is 0.
__device__ __forceinline__ bool wants_refining(float most, float maximum, float anchor, float logit_scale) {
  return anchor != 0 || (is_saturated(most, logit_scale) && !((maximum - most) * logit_scale > saturated_logit));
}

// For a row that does: whether its scores are refined, and kept relative to the anchor. That follows the maximum: far
// from it a score would be rounded at the size of the distance. A row whose maximum has risen to where floats suffice
// has none: padding before its first key would have all later ones refined.
__device__ __forceinline__ bool follow_maximum(float& maximum, float& anchor, float most, float logit_scale) {
  const bool rises = most > maximum + anchor && most < attention_infinity, saturated = is_saturated(most, logit_scale);
  const float higher = !rises ? anchor : saturated ? most : 0.0f;
  maximum += anchor - higher;
  anchor = higher;
  return saturated || higher != 0;
}
__device__ __forceinline__ RowAnchor follow_maximum(SoftmaxRows& rows, const float (&maxima)[2], float logit_scale) {
  RowAnchor result;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    result.refine[half] = wants_refining(maxima[half], rows.maximum[half], rows.anchor[half], logit_scale) &&
        follow_maximum(rows.maximum[half], rows.anchor[half], maxima[half], logit_scale);
    result.anchor[half] = rows.anchor[half];
  }
  return result;
}
__device__ __forceinline__ bool wants_refining(const SoftmaxRows& rows, const float (&maxima)[2], float logit_scale) {
  return wants_refining(maxima[0], rows.maximum[0], rows.anchor[0], logit_scale) ||
      wants_refining(maxima[1], rows.maximum[1], rows.anchor[1], logit_scale);
}

// Scores become weights; the rows' maxima and sums take them in. `factors` are what earlier sums and outputs have been
// multiplied by, or have to be.
template <int Keys>
__device__ __forceinline__ void take_weights(ScoreFragment<Keys>& scores, SoftmaxRows& rows, const float (&maxima)[2],
                                             float exp2_scale, float (&factors)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float before = rows.maximum[half];
    const float maximum = rows.maximum[half] = fmaxf(maxima[half], before);
    const float shift = maximum == -attention_infinity ? 0.0f : maximum;  // where every score is -inf: weights of 0
    factors[half] = ptx::exp2_approx((before - shift) * exp2_scale);
    float sum = 0;
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = scores.x[n][2 * half + i];
        x = ptx::exp2_approx((x - shift) * exp2_scale);
        sum += x;
      }
    rows.sum[half] = fmaf(rows.sum[half], factors[half], sum);
  }
}

// ---- the end of a row ----

struct RowEnd {
  float factor, divisor;  // output = factor * weighted sum / divisor
  float lse;
};

// exp(x) of a difference of logits, x <= 0.
__device__ __forceinline__ float exp_of_difference(double x) {
  const float rounded = static_cast<float>(x);
  const float rest = static_cast<float>(x - rounded);
  return exp_nonpositive(rounded, isfinite(rest) && rounded > exp_lowest ? rest : 0.0f);
}

// From a row's largest stored score, its anchor and its sum of weights.
__device__ __forceinline__ RowEnd end_of_row(const AttentionParams& p, int head, float maximum, float anchor,
                                             float sum) {
  const bool nothing = sum == 0;  // the largest weight of a row is 1, so only a row without keys sums to 0
  double top = nothing ? -__builtin_huge_val()
                       : (static_cast<double>(maximum) + static_cast<double>(anchor)) * p.logit_scale;
  float factor = nothing ? 0.0f : 1.0f, total = sum;
  if (p.sinks) {
    const double sink = p.sinks[head];
    if (sink != sink || sink == __builtin_huge_val()) {
      total = __int_as_float(0x7FC00000);
    } else if (sink > -__builtin_huge_val()) {
      const double higher = top > sink ? top : sink;
      factor = nothing ? 0.0f : exp_of_difference(top - higher);
      total = sum * factor + exp_of_difference(sink - higher);
      top = higher;
    }
  }
  if (total == 0) return {0.0f, 1.0f, -attention_infinity};
  return {factor, total * p.kept_share, static_cast<float>(top + static_cast<double>(logf(total)))};
}

}  // namespace transfuse::cuda
