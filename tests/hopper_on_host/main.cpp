// Runs conv_sm90a on the machine of machine.h and compares it with plain loops.
//
//   main SEED [NUMBER...]   these cases, or all; one line for each, exit code 1 if one is wrong
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/conv_schedule.h"

using namespace moe_kernels;

namespace {

struct Case {
  const char* name;
  int multiprocessors, blocks;  // blocks of a cluster that the kernel has to have
  int E, H, W;                  // the convolution's input; its output follows
  int N, C, O, R, stride, padding, D;
  bool shared, input_grad;
};

constexpr Case kCases[] = {
    // Every kernel, with many chunks, few chunks, more blocks than tiles, several tiles a block.
    {"wide 128 x 64, side", 2, 1, 1, 2, 2, 128, 128, 64, 3, 1, 1, 64, false, false},
    {"wide 128 x 128", 2, 1, 1, 3, 2, 128, 64, 128, 3, 1, 1, 0, false, false},
    {"wide 128 x 256, side", 1, 1, 1, 2, 1, 128, 64, 256, 3, 1, 1, 64, false, false},
    {"wide 256 x 128", 1, 1, 1, 1, 2, 256, 64, 128, 3, 1, 1, 0, false, false},
    {"narrow 128, two experts, side", 2, 1, 2, 3, 2, 128, 64, 64, 3, 1, 1, 64, false, false},
    {"narrow 256", 1, 1, 1, 2, 3, 256, 64, 64, 3, 1, 1, 0, false, false},
    {"narrow, shared input", 3, 1, 3, 2, 2, 128, 64, 64, 1, 1, 0, 0, true, false},
    {"gradient, stride 2, some pixels without taps", 2, 1, 1, 4, 3, 128, 64, 128, 1, 2, 0, 0, false,
     true},
    {"gradient, stride 2, side", 2, 1, 1, 4, 3, 128, 64, 128, 3, 2, 1, 64, false, true},
    {"narrow gradient, two experts", 2, 1, 2, 3, 3, 128, 64, 64, 3, 1, 1, 0, false, true},
    // Clusters: shared filters, then shared images.
    {"cluster, 2 x 128 x 256, side", 2, 2, 1, 2, 1, 256, 64, 256, 3, 1, 1, 64, false, false},
    {"cluster, 2 x 128 x 128, odd multiprocessor", 5, 2, 1, 2, 3, 256, 64, 128, 3, 1, 1, 0, false,
     false},
    {"cluster, 2 x 128 x 64, gradient", 4, 2, 2, 2, 2, 256, 128, 64, 3, 1, 1, 0, false, true},
    {"cluster, 2 x 256 x 128", 2, 2, 1, 1, 2, 512, 64, 128, 3, 1, 1, 0, false, false},
    {"cluster, 128 x 2 x 256", 2, 2, 1, 1, 3, 128, 64, 512, 1, 1, 0, 64, false, false},
    {"cluster, 128 x 2 x 128, strides, side", 4, 2, 2, 4, 3, 128, 64, 256, 3, 2, 1, 64, false,
     false},
    {"cluster, 128 x 2 x 64, shared input", 2, 2, 2, 3, 2, 128, 128, 128, 3, 1, 1, 0, true, false},
    {"cluster, gradient, some pixels without taps", 2, 2, 1, 3, 3, 128, 64, 256, 1, 2, 0, 0, false,
     true},
};

struct Matrix {
  std::vector<__nv_bfloat16> stored;
  std::vector<float> values;
  const void* given() const { return stored.empty() ? nullptr : stored.data(); }
};

std::mt19937 generator(7);

float normal() { return std::normal_distribution<float>()(generator); }

Matrix random_matrix(std::size_t size) {
  Matrix made;
  for (std::size_t i = 0; i < size; ++i) {
    made.stored.push_back(to_bfloat16(normal()));
    made.values.push_back(to_float(made.stored.back()));
  }
  return made;
}

// Sizes of the call: for a gradient, source and output change places.
ConvSizes sizes_of(const Case& c) {
  const int P = (c.H + 2 * c.padding - c.R) / c.stride + 1;
  const int Q = (c.W + 2 * c.padding - c.R) / c.stride + 1;
  ConvSizes sizes{c.E,       P, Q, c.N, c.O, c.shared ? 1 : c.E, c.H, c.W, c.C, c.R, c.R, c.stride,
                  c.padding, 0, 0, c.D, 1,   c.input_grad};
  if (c.input_grad) {
    std::swap(sizes.P, sizes.H);
    std::swap(sizes.Q, sizes.W);
  }
  // The side of a strided layer is strided as well.
  sizes.side_stride = c.stride;
  if (c.D > 0) {
    sizes.side_H = c.input_grad ? sizes.H : (sizes.P - 1) * c.stride + 1;
    sizes.side_W = c.input_grad ? sizes.W : (sizes.Q - 1) * c.stride + 1;
  }
  return sizes;
}

// Whether tap number `tap` of the convolution connects these pixels of source and output.
bool meet(int source, int output, int tap, int stride, int padding, bool input_grad) {
  const int from = input_grad ? output : source, to = input_grad ? source : output;
  return from == to * stride + tap - padding;
}

// total [N, O] += rows [N, C] times filters [O, C] transposed, whose rows are `distance` apart.
void add_product(const float* rows, const float* filters, int N, int O, int C, int distance,
                 float* total) {
  for (int n = 0; n < N; ++n) {
    for (int o = 0; o < O; ++o) {
      float sum = 0.0f;
      for (int c = 0; c < C; ++c) sum += rows[n * C + c] * filters[o * distance + c];
      total[n * O + o] += sum;
    }
  }
}

struct Call {
  Matrix source, weight, side, side_weight, addend, activation;
  std::vector<float> bias;
};

// One output pixel of one expert, before bias and the rest.
std::vector<float> plain_pixel(const ConvSizes& s, const Call& call, int e, int p, int q) {
  std::vector<float> total(s.N * s.O);
  for (int h = 0; h < s.H; ++h) {
    for (int w = 0; w < s.W; ++w) {
      for (int r = 0; r < s.R; ++r) {
        for (int t = 0; t < s.S; ++t) {
          if (!meet(h, p, r, s.stride, s.padding, s.input_grad) ||
              !meet(w, q, t, s.stride, s.padding, s.input_grad)) {
            continue;
          }
          const Index pixel = ((s.source_E == 1 ? 0 : e) * s.H + h) * s.W + w;
          add_product(&call.source.values[pixel * s.N * s.C],
                      &call.weight.values[((Index{e} * s.O * s.R + r) * s.S + t) * s.C], s.N, s.O,
                      s.C, s.R * s.S * s.C, total.data());
        }
      }
    }
  }
  for (int h = 0; h < s.side_H; ++h) {
    for (int w = 0; w < s.side_W; ++w) {
      if (meet(h, p, 0, s.side_stride, 0, s.input_grad) &&
          meet(w, q, 0, s.side_stride, 0, s.input_grad)) {
        add_product(&call.side.values[((Index{e} * s.side_H + h) * s.side_W + w) * s.N * s.D],
                    &call.side_weight.values[Index{e} * s.O * s.D], s.N, s.O, s.D, s.D,
                    total.data());
      }
    }
  }
  return total;
}

bool run(int number, const Case& c) {
  machine::multiprocessors = c.multiprocessors;
  const ConvSizes s = sizes_of(c);
  const Index E = s.E, outputs = E * s.P * s.Q * s.N * s.O;
  Call call{random_matrix(Index{s.source_E} * s.H * s.W * s.N * s.C),
            random_matrix(E * s.O * s.R * s.S * s.C),
            random_matrix(E * s.side_H * s.side_W * s.N * s.D),
            random_matrix(E * s.O * s.D),
            random_matrix(outputs),
            c.input_grad ? random_matrix(outputs) : Matrix{},
            {}};
  if (!c.input_grad) {
    for (int i = 0; i < s.E * s.O; ++i) call.bias.push_back(normal());
  }
  std::vector<__nv_bfloat16> output(outputs, __nv_bfloat16{0x7fc0});  // NaN
  const int code = conv_sm90a(call.source.given(), call.weight.given(), call.side.given(),
                              call.side_weight.given(), call.bias.empty() ? nullptr : &call.bias[0],
                              call.addend.given(), call.activation.given(), output.data(), s,
                              !c.input_grad, c.blocks > 1, kBFloat16, nullptr);
  std::vector<double> expected;
  for (Index pixel = 0; pixel < E * s.P * s.Q; ++pixel) {
    const int e = static_cast<int>(pixel / (s.P * s.Q));
    const std::vector<float> total = plain_pixel(s, call, e, pixel / s.Q % s.P, pixel % s.Q);
    for (int i = 0; i < s.N * s.O; ++i) {
      const Index place = pixel * s.N * s.O + i;
      float value = total[i] + call.addend.values[place];
      if (!c.input_grad) value = std::max(value + call.bias[e * s.O + i % s.O], 0.0f);
      if (c.input_grad && !(call.activation.values[place] > 0.0f)) value = 0.0f;
      expected.push_back(value);
    }
  }
  const double largest =
      std::fabs(*std::max_element(expected.begin(), expected.end(),
                                  [](double a, double b) { return std::fabs(a) < std::fabs(b); }));
  Index nan = 0, wrong = 0;
  for (Index i = 0; i < outputs; ++i) {
    const double found = to_float(output[i]);
    // Half a step of bfloat16 is allowed, and sums in another order.
    const double allowed = std::fabs(expected[i]) / 256 + 1e-5 * largest;
    nan += std::isnan(found);
    wrong += std::fabs(found - expected[i]) > allowed;
  }
  const bool right = code == 0 && machine::cluster_blocks == c.blocks && nan + wrong == 0;
  std::printf("%s %d %s: code %d, clusters of %d, %ld NaN, %ld wrong of %ld, %ld copies\n",
              right ? "right" : "WRONG", number, c.name, code, machine::cluster_blocks, nan, wrong,
              outputs, machine::num_copies);
  std::fflush(stdout);
  machine::num_copies = 0;
  return right;
}

bool schedules_are_kept() {
  ConvSizes sizes = sizes_of(kCases[0]);
  const Schedule& first = schedule_for(sizes, 128, 64, 132, false);
  const bool kept = &first == &schedule_for(sizes, 128, 64, 132, false);
  const bool told_apart = &first != &schedule_for(sizes, 128, 64, 131, false);
  sizes.input_grad = true;
  return kept && told_apart && &first != &schedule_for(sizes, 128, 64, 132, false);
}

}  // namespace

int main(int argc, char** argv) {
  machine::seed = static_cast<unsigned>(std::atoi(argv[1]));
  constexpr int kCount = sizeof kCases / sizeof kCases[0];
  bool right = schedules_are_kept();
  std::printf("schedules %s\n", right ? "are kept" : "ARE NOT KEPT");
  for (int number = 0; number < kCount; ++number) {
    const auto named = [&](const char* x) { return std::atoi(x) == number; };
    if (argc > 2 && std::none_of(argv + 2, argv + argc, named)) continue;
    right = run(number, kCases[number]) && right;
  }
  std::printf("%d kernels\n", machine::num_kernels());
  return right ? 0 : 1;
}
