// CPU: gate softmax x expert logits, its gradients, and both fused with cross-entropy.
//
// With d the gradient of the logits and s[e] = <d, expert_logits[e]>:
//     grad_expert_logits[e] = weights[e] * d
//     grad_gate_logits[e] = weights[e] * (s[e] - sum_j weights[j] * s[j])
// Cross-entropy has d = softmax(logits) - one_hot(label).
// Source: eqs. (1)-(2) of arXiv:2512.20821.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/parallel.h"

namespace moe_kernels {
namespace {

// Writes exp(x - max) to `out`; returns {max, sum}. The largest term is 1, so nothing overflows;
// NaN loses every comparison for the maximum, but then reaches the sum through exp.
struct Exponentials {
  float max, sum;
};

inline Exponentials exponentials(const float* x, float* out, Index n) {
  float max = -std::numeric_limits<float>::infinity();
  for (Index i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  float sum = 0.0f;
  for (Index i = 0; i < n; ++i) {
    out[i] = std::exp(x[i] - max);
    sum += out[i];
  }
  return {max, sum};
}

inline void softmax(const float* gate_logits, float* weights, Index E) {
  const float sum = exponentials(gate_logits, weights, E).sum;
  for (Index e = 0; e < E; ++e) weights[e] /= sum;
}

// `expert_logits` points to the first expert's row of this image, the next is `stride` further.
inline void combine(const float* weights, const float* expert_logits, float* logits, Index E,
                    Index K, Index stride) {
  for (Index k = 0; k < K; ++k) logits[k] = 0.0f;
  for (Index e = 0; e < E; ++e) {
    const float* row = expert_logits + e * stride;
    const float weight = weights[e];
#pragma omp simd
    for (Index k = 0; k < K; ++k) logits[k] += weight * row[k];
  }
}

inline void gradients(const float* d, const float* weights, const float* expert_logits,
                      float* grad_gate_logits, float* grad_expert_logits, Index E, Index K,
                      Index stride) {
  float mean = 0.0f;
  for (Index e = 0; e < E; ++e) {
    const float* row = expert_logits + e * stride;
    float* grad_row = grad_expert_logits + e * stride;
    const float weight = weights[e];
    float s = 0.0f;
#pragma omp simd reduction(+ : s)
    for (Index k = 0; k < K; ++k) {
      s += d[k] * row[k];
      grad_row[k] = weight * d[k];
    }
    grad_gate_logits[e] = s;
    mean += weight * s;
  }
  for (Index e = 0; e < E; ++e) {
    grad_gate_logits[e] = weights[e] * (grad_gate_logits[e] - mean);
  }
}

// Wide vectors pay for themselves here, not in the two gradients: with 10 classes those were
// slower.
MOE_KERNELS_CLONES
void forward_range(const float* gate_logits, const float* expert_logits, float* logits, Index begin,
                   Index end, Index B, Index E, Index K) {
  std::vector<float> weights(E);
  for (Index b = begin; b < end; ++b) {
    softmax(gate_logits + b * E, weights.data(), E);
    combine(weights.data(), expert_logits + b * K, logits + b * K, E, K, B * K);
  }
}

void backward_range(const float* grad_logits, const float* gate_logits, const float* expert_logits,
                    float* grad_gate_logits, float* grad_expert_logits, Index begin, Index end,
                    Index B, Index E, Index K) {
  std::vector<float> weights(E);
  for (Index b = begin; b < end; ++b) {
    softmax(gate_logits + b * E, weights.data(), E);
    gradients(grad_logits + b * K, weights.data(), expert_logits + b * K, grad_gate_logits + b * E,
              grad_expert_logits + b * K, E, K, B * K);
  }
}

void cross_entropy_range(const float* gate_logits, const float* expert_logits,
                         const std::int64_t* labels, float* loss, float* grad_gate_logits,
                         float* grad_expert_logits, Index begin, Index end, Index B, Index E,
                         Index K) {
  std::vector<float> weights(E), logits(K), d(K);
  for (Index b = begin; b < end; ++b) {
    softmax(gate_logits + b * E, weights.data(), E);
    combine(weights.data(), expert_logits + b * K, logits.data(), E, K, B * K);
    const Exponentials exp = exponentials(logits.data(), d.data(), K);
    const std::int64_t label = labels[b];
    const bool valid = label >= 0 && label < K;
    const float sum = valid ? exp.sum : std::numeric_limits<float>::quiet_NaN();
    for (Index k = 0; k < K; ++k) d[k] = d[k] / sum;
    loss[b] = std::log(sum);
    if (valid) {
      loss[b] -= logits[label] - exp.max;
      d[label] -= 1.0f;
    }
    gradients(d.data(), weights.data(), expert_logits + b * K, grad_gate_logits + b * E,
              grad_expert_logits + b * K, E, K, B * K);
  }
}

}  // namespace

void softmax_combine(const float* gate_logits, const float* expert_logits, float* logits, Index B,
                     Index E, Index K, int num_threads) {
  parallel_images(B, B * E * K, num_threads, [=](Index begin, Index end) {
    forward_range(gate_logits, expert_logits, logits, begin, end, B, E, K);
  });
}

void softmax_combine_backward(const float* grad_logits, const float* gate_logits,
                              const float* expert_logits, float* grad_gate_logits,
                              float* grad_expert_logits, Index B, Index E, Index K,
                              int num_threads) {
  parallel_images(B, B * E * K, num_threads, [=](Index begin, Index end) {
    backward_range(grad_logits, gate_logits, expert_logits, grad_gate_logits, grad_expert_logits,
                   begin, end, B, E, K);
  });
}

void softmax_combine_cross_entropy(const float* gate_logits, const float* expert_logits,
                                   const std::int64_t* labels, float* loss, float* grad_gate_logits,
                                   float* grad_expert_logits, Index B, Index E, Index K,
                                   int num_threads) {
  parallel_images(B, B * E * K, num_threads, [=](Index begin, Index end) {
    cross_entropy_range(gate_logits, expert_logits, labels, loss, grad_gate_logits,
                        grad_expert_logits, begin, end, B, E, K);
  });
}

}  // namespace moe_kernels
