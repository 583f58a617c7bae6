// CPU: one L-inf attack step. Compiled with -ffp-contract=off, see step_pixel in kernels.h.
// Source: eqs. (4)-(5) of arXiv:2512.20821; Madry et al., arXiv:1706.06083.
#include "cpu/parallel.h"

namespace moe_kernels {
namespace {

MOE_KERNELS_CLONES
void step_range(float* adversarial, const float* grad, const float* images, const float* epsilon,
                const float* step_size, Index begin, Index end, Index P, float low, float high) {
  for (Index b = begin; b < end; ++b) {
    const float radius = epsilon[b], step = step_size[b];
#pragma omp simd
    for (Index i = b * P; i < (b + 1) * P; ++i) {
      adversarial[i] = step_pixel(adversarial[i], grad[i], images[i], radius, step, low, high);
    }
  }
}

}  // namespace

void linf_step(float* adversarial, const float* grad, const float* images, const float* epsilon,
               const float* step_size, Index B, Index P, float low, float high, int num_threads) {
  parallel_images(B, B * P, num_threads, [=](Index begin, Index end) {
    step_range(adversarial, grad, images, epsilon, step_size, begin, end, P, low, high);
  });
}

}  // namespace moe_kernels
