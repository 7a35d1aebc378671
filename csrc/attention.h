// The raw forward ops of attention.cpp, for host code that composes them. Their arguments:
// python/transfuse/ops/attention.py.
#pragma once

#include <optional>
#include <tuple>

#include "checks.h"

namespace transfuse {

// Both return (output, lse).
std::tuple<Tensor, Tensor> attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                             std::optional<Tensor> bias, std::optional<Tensor> mask,
                                             std::optional<Tensor> seqlens_k, std::optional<Tensor> alibi_slopes,
                                             std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed,
                                             double scale, bool causal, bool bottom_right, int64_t window_left,
                                             int64_t window_right, double softcap, double dropout_p);
std::tuple<Tensor, Tensor> varlen_attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                                    const Tensor cu_seqlens_q, const Tensor cu_seqlens_k,
                                                    std::optional<Tensor> bias, std::optional<Tensor> alibi_slopes,
                                                    std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed,
                                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                    bool causal, bool bottom_right, int64_t window_left,
                                                    int64_t window_right, double softcap, double dropout_p);

}  // namespace transfuse
