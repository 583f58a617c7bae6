// With cpu/bind_layers.cpp the only file that sees Python. Addresses arrive as integers (torch's
// data_ptr()), the GIL is released while a kernel runs, and error codes become RuntimeError.
// Shapes, dtypes and devices were checked by the caller.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"
#include "wrap.h"

namespace py = pybind11;
namespace mk = moe_kernels;

#ifdef MOE_KERNELS_CPU_LAYERS
namespace moe_kernels {
namespace avx512 {
void bind_layers(py::module_& module);
}
namespace avx2 {
void bind_layers(py::module_& module);
}
}  // namespace moe_kernels
#endif

namespace {

#ifdef MOE_KERNELS_CUDA_ARCHS
template <typename... T>
auto wrap_cuda(int (*kernel)(T...)) {
  return [kernel](mk::Argument<T>... arguments) {
    if (const int code = kernel(mk::unwrap<T>(arguments)...); code != 0) {
      throw std::runtime_error("CUDA error " + std::to_string(code) + ": " +
                               mk::cuda_error_message(code));
    }
  };
}
#endif

// Of the instruction sets that matter here, those that this CPU and its operating system offer.
py::list cpu_features() {
  py::list found;
#ifdef MOE_KERNELS_CPU_LAYERS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.append("avx2");
  if (__builtin_cpu_supports("fma")) found.append("fma");
  if (__builtin_cpu_supports("avx512f")) found.append("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.append("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) found.append("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) found.append("avx512dq");
  if (__builtin_cpu_supports("avx512bf16")) found.append("avx512bf16");
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled kernels of moe_kernels; call them through the package, not from here.";
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  const auto num_threads = arg("num_threads") = 0;  // 0: as many as OpenMP likes

  module.def("softmax_combine", mk::wrap(mk::softmax_combine), ReleaseGil(), arg("gate_logits"),
             arg("expert_logits"), arg("logits"), arg("B"), arg("E"), arg("K"), num_threads);
  module.def("softmax_combine_backward", mk::wrap(mk::softmax_combine_backward), ReleaseGil(),
             arg("grad_logits"), arg("gate_logits"), arg("expert_logits"), arg("grad_gate_logits"),
             arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"), num_threads);
  module.def("softmax_combine_cross_entropy", mk::wrap(mk::softmax_combine_cross_entropy),
             ReleaseGil(), arg("gate_logits"), arg("expert_logits"), arg("labels"), arg("loss"),
             arg("grad_gate_logits"), arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"),
             num_threads);
  module.def("linf_step", mk::wrap(mk::linf_step), ReleaseGil(), arg("adversarial"), arg("grad"),
             arg("images"), arg("epsilon"), arg("step_size"), arg("B"), arg("P"), arg("low"),
             arg("high"), num_threads);
  module.def("content_hashes", mk::wrap(mk::content_hashes), ReleaseGil(), arg("addresses"),
             arg("sizes"), arg("hashes"), arg("count"), num_threads);

  py::class_<mk::ConvSizes>(module, "ConvSizes", py::module_local())
      .def(py::init([](int E, int P, int Q, int N, int O, int source_E, int H, int W, int C, int R,
                       int S, int stride, int padding, int side_H, int side_W, int D,
                       int side_stride, bool input_grad, int groups, int channels, int outputs) {
             return mk::ConvSizes{E,      P, Q,           N,          O,      source_E, H,
                                  W,      C, R,           S,          stride, padding,  side_H,
                                  side_W, D, side_stride, input_grad, groups, channels, outputs};
           }),
           py::kw_only(), arg("E") = 1, arg("P"), arg("Q"), arg("N"), arg("O"), arg("source_E") = 1,
           arg("H"), arg("W"), arg("C"), arg("R"), arg("S"), arg("stride"), arg("padding"),
           arg("side_H") = 0, arg("side_W") = 0, arg("D") = 0, arg("side_stride") = 1,
           arg("input_grad") = false, arg("groups") = 1, arg("channels") = 0, arg("outputs") = 0)
      .def_readonly("E", &mk::ConvSizes::E)
      .def_readonly("P", &mk::ConvSizes::P)
      .def_readonly("Q", &mk::ConvSizes::Q)
      .def_readonly("N", &mk::ConvSizes::N)
      .def_readonly("O", &mk::ConvSizes::O)
      .def_readonly("source_E", &mk::ConvSizes::source_E)
      .def_readonly("H", &mk::ConvSizes::H)
      .def_readonly("W", &mk::ConvSizes::W)
      .def_readonly("C", &mk::ConvSizes::C)
      .def_readonly("R", &mk::ConvSizes::R)
      .def_readonly("S", &mk::ConvSizes::S)
      .def_readonly("stride", &mk::ConvSizes::stride)
      .def_readonly("padding", &mk::ConvSizes::padding)
      .def_readonly("side_H", &mk::ConvSizes::side_H)
      .def_readonly("side_W", &mk::ConvSizes::side_W)
      .def_readonly("D", &mk::ConvSizes::D)
      .def_readonly("side_stride", &mk::ConvSizes::side_stride)
      .def_readonly("input_grad", &mk::ConvSizes::input_grad)
      .def_readonly("groups", &mk::ConvSizes::groups)
      .def_readonly("channels", &mk::ConvSizes::channels)
      .def_readonly("outputs", &mk::ConvSizes::outputs);
  py::class_<mk::PoolSizes>(module, "PoolSizes", py::module_local())
      .def(py::init(
               [](int N, int H, int W, int C, int P, int Q, int kernel, int stride, int padding) {
                 return mk::PoolSizes{N, H, W, C, P, Q, kernel, stride, padding};
               }),
           py::kw_only(), arg("N"), arg("H"), arg("W"), arg("C"), arg("P"), arg("Q"), arg("kernel"),
           arg("stride"), arg("padding"))
      .def_readonly("N", &mk::PoolSizes::N)
      .def_readonly("H", &mk::PoolSizes::H)
      .def_readonly("W", &mk::PoolSizes::W)
      .def_readonly("C", &mk::PoolSizes::C)
      .def_readonly("P", &mk::PoolSizes::P)
      .def_readonly("Q", &mk::PoolSizes::Q)
      .def_readonly("kernel", &mk::PoolSizes::kernel)
      .def_readonly("stride", &mk::PoolSizes::stride)
      .def_readonly("padding", &mk::PoolSizes::padding);

#ifdef MOE_KERNELS_CPU_LAYERS
  py::module_ avx512 = module.def_submodule("avx512", "Layers of one network, by AVX-512.");
  mk::avx512::bind_layers(avx512);
  py::module_ avx2 = module.def_submodule("avx2", "Layers of one network, by AVX2.");
  mk::avx2::bind_layers(avx2);
#endif
  module.attr("cpu_features") = cpu_features();

  module.def(
      "conv_sm90a_tiles",
      [](const mk::ConvSizes& sizes, int multiprocessors, bool clusters) {
        if (sizes.N % 128 != 0 || sizes.O % 64 != 0 || multiprocessors < 1) {
          throw py::value_error("N has to be a multiple of 128 and O of 64, for a GPU");
        }
        const mk::ConvTiles tiles = mk::conv_sm90a_tiles(sizes, multiprocessors, clusters);
        return std::tuple(tiles.rows, tiles.channels, tiles.worker_rows, tiles.worker_channels,
                          tiles.narrow);
      },
      arg("sizes"), arg("multiprocessors"), arg("clusters"));
  module.def("conv_by_schedule", mk::wrap(mk::conv_by_schedule), ReleaseGil(), arg("source"),
             arg("weight"), arg("side"), arg("side_weight"), arg("bias"), arg("addend"),
             arg("activation"), arg("output"), arg("sizes"), arg("relu"), arg("tile_rows"),
             arg("tile_channels"), arg("num_workers"), arg("by_expert"));

  py::list cuda_archs;
#ifdef MOE_KERNELS_CUDA_ARCHS
  for (const char* arch : {MOE_KERNELS_CUDA_ARCHS}) cuda_archs.append(arch);
  const auto dtype = arg("dtype"), stream = arg("stream");
  module.def("softmax_combine_cuda", wrap_cuda(mk::softmax_combine_cuda), ReleaseGil(),
             arg("gate_logits"), arg("expert_logits"), arg("logits"), arg("B"), arg("E"), arg("K"),
             dtype, stream);
  module.def("softmax_combine_backward_cuda", wrap_cuda(mk::softmax_combine_backward_cuda),
             ReleaseGil(), arg("grad_logits"), arg("gate_logits"), arg("expert_logits"),
             arg("grad_gate_logits"), arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"),
             dtype, stream);
  module.def("softmax_combine_cross_entropy_cuda",
             wrap_cuda(mk::softmax_combine_cross_entropy_cuda), ReleaseGil(), arg("gate_logits"),
             arg("expert_logits"), arg("labels"), arg("loss"), arg("grad_gate_logits"),
             arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"), dtype, stream);
  module.def("linf_step_cuda", wrap_cuda(mk::linf_step_cuda), ReleaseGil(), arg("adversarial"),
             arg("grad"), arg("images"), arg("epsilon"), arg("step_size"), arg("B"), arg("P"),
             arg("low"), arg("high"), dtype, stream);
#ifdef MOE_KERNELS_SM90A
  module.def("conv_sm90a", wrap_cuda(mk::conv_sm90a), ReleaseGil(), arg("source"), arg("weight"),
             arg("side"), arg("side_weight"), arg("bias"), arg("addend"), arg("activation"),
             arg("output"), arg("sizes"), arg("relu"), arg("clusters"), dtype, stream);
#endif
#endif
  module.attr("has_cuda") = py::bool_(py::len(cuda_archs) > 0);
  module.attr("cuda_archs") = cuda_archs;
}
