// The only file that sees Python. Addresses arrive as integers (torch's data_ptr()), the GIL is
// released while a kernel runs, and error codes become RuntimeError. Shapes, dtypes and devices
// were checked by the caller.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace py = pybind11;
namespace mk = moe_kernels;

namespace {

// Python passes an integer where the kernel takes a pointer, and the number itself elsewhere.
template <typename T>
using Argument = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <typename T>
T unwrap(Argument<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <typename... T>
auto wrap(void (*kernel)(T...)) {
  return [kernel](Argument<T>... arguments) { kernel(unwrap<T>(arguments)...); };
}

template <typename... T>
auto wrap(mk::Index (*kernel)(T...)) {
  return [kernel](Argument<T>... arguments) { return kernel(unwrap<T>(arguments)...); };
}

#ifdef MOE_KERNELS_CUDA_ARCHS
template <typename... T>
auto wrap(int (*kernel)(T...)) {
  return [kernel](Argument<T>... arguments) {
    if (const int code = kernel(unwrap<T>(arguments)...); code != 0) {
      throw std::runtime_error("CUDA error " + std::to_string(code) + ": " +
                               mk::cuda_error_message(code));
    }
  };
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled kernels of moe_kernels; call them through the package, not from here.";
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  const auto num_threads = arg("num_threads") = 0;  // 0: as many as OpenMP likes

  module.def("softmax_combine", wrap(mk::softmax_combine), ReleaseGil(), arg("gate_logits"),
             arg("expert_logits"), arg("logits"), arg("B"), arg("E"), arg("K"), num_threads);
  module.def("softmax_combine_backward", wrap(mk::softmax_combine_backward), ReleaseGil(),
             arg("grad_logits"), arg("gate_logits"), arg("expert_logits"), arg("grad_gate_logits"),
             arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"), num_threads);
  module.def("softmax_combine_cross_entropy", wrap(mk::softmax_combine_cross_entropy), ReleaseGil(),
             arg("gate_logits"), arg("expert_logits"), arg("labels"), arg("loss"),
             arg("grad_gate_logits"), arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"),
             num_threads);
  module.def("linf_step", wrap(mk::linf_step), ReleaseGil(), arg("adversarial"), arg("grad"),
             arg("images"), arg("epsilon"), arg("step_size"), arg("B"), arg("P"), arg("low"),
             arg("high"), num_threads);

  py::list cpu_features;
#ifdef MOE_KERNELS_SLAB
  for (const char* feature : {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16"}) {
    if (mk::cpu_has(feature)) cpu_features.append(feature);
  }
  py::class_<mk::SlabConv>(module, "SlabConv", py::module_local())
      .def(py::init([](mk::Index N, mk::Index H, mk::Index W, mk::Index C, mk::Index P, mk::Index Q,
                       mk::Index O, mk::Index R, mk::Index S, mk::Index stride, mk::Index padding,
                       bool transposed, bool relu, bool out_float32, mk::Index pointwise_H,
                       mk::Index pointwise_W, mk::Index pointwise_C, mk::Index pointwise_stride) {
             return mk::SlabConv{
                 N,    H,           W,           C,           P,           Q,
                 O,    R,           S,           stride,      padding,     transposed,
                 relu, out_float32, pointwise_H, pointwise_W, pointwise_C, pointwise_stride};
           }),
           py::kw_only(), arg("N"), arg("H"), arg("W"), arg("C"), arg("P"), arg("Q"), arg("O"),
           arg("R"), arg("S"), arg("stride"), arg("padding"), arg("transposed"), arg("relu"),
           arg("out_float32"), arg("pointwise_H"), arg("pointwise_W"), arg("pointwise_C"),
           arg("pointwise_stride"));
  for (const auto& [name, kernel] :
       {std::pair{"slab_conv", mk::slab_conv}, std::pair{"slab_winograd", mk::slab_winograd}}) {
    module.def(name, wrap(kernel), ReleaseGil(), arg("source"), arg("weights"), arg("bias"),
               arg("addend"), arg("mask"), arg("pointwise_source"), arg("pointwise_weights"),
               arg("out"), arg("shape"), arg("dtype"), num_threads);
  }
  module.def("slab_pack", wrap(mk::slab_pack), ReleaseGil(), arg("weight"), arg("packed"), arg("O"),
             arg("K"), arg("outputs"), arg("channels"), arg("taps"), arg("output_stride"),
             arg("channel_stride"), arg("tap_stride"), arg("doubled"), arg("dtype"), num_threads);
  module.def("slab_pack_winograd", wrap(mk::slab_pack_winograd), ReleaseGil(), arg("weight"),
             arg("forward"), arg("gradient"), arg("O"), arg("C"), arg("outputs"), arg("channels"),
             arg("dtype"), num_threads);
  module.def("slab_pool", wrap(mk::slab_pool), ReleaseGil(), arg("source"), arg("out"), arg("N"),
             arg("H"), arg("W"), arg("C"), arg("P"), arg("Q"), arg("kernel"), arg("stride"),
             arg("padding"), arg("maximum"), arg("dtype"), num_threads);
  module.def("slab_pool_backward", wrap(mk::slab_pool_backward), ReleaseGil(), arg("grad"),
             arg("source"), arg("output"), arg("skip"), arg("mask"), arg("out"), arg("N"), arg("H"),
             arg("W"), arg("C"), arg("P"), arg("Q"), arg("kernel"), arg("stride"), arg("padding"),
             arg("dtype"), num_threads);
  module.def("slab_mean", wrap(mk::slab_mean), ReleaseGil(), arg("source"), arg("mean"),
             arg("pixels"), arg("N"), arg("C"), arg("dtype"), num_threads);
  module.def("slab_mean_backward", wrap(mk::slab_mean_backward), ReleaseGil(), arg("grad"),
             arg("mask"), arg("out"), arg("pixels"), arg("N"), arg("C"), arg("dtype"), num_threads);
#endif
  module.attr("cpu_features") = cpu_features;

  module.def("grouped_conv_emulation", wrap(mk::grouped_conv_emulation), ReleaseGil(),
             arg("source"), arg("weight"), arg("side"), arg("side_weight"), arg("bias"),
             arg("addend"), arg("activation"), arg("output"), arg("E"), arg("P"), arg("Q"),
             arg("N"), arg("O"), arg("source_E"), arg("H"), arg("W"), arg("C"), arg("R"), arg("S"),
             arg("stride"), arg("padding"), arg("side_H"), arg("side_W"), arg("D"),
             arg("side_stride"), arg("input_grad"), arg("relu"), arg("tile_rows"),
             arg("tile_channels"), arg("num_workers"), arg("by_expert"));

  py::list cuda_archs;
#ifdef MOE_KERNELS_CUDA_ARCHS
  for (const char* arch : {MOE_KERNELS_CUDA_ARCHS}) cuda_archs.append(arch);
  const auto dtype = arg("dtype"), stream = arg("stream");
  module.def("softmax_combine_cuda", wrap(mk::softmax_combine_cuda), ReleaseGil(),
             arg("gate_logits"), arg("expert_logits"), arg("logits"), arg("B"), arg("E"), arg("K"),
             dtype, stream);
  module.def("softmax_combine_backward_cuda", wrap(mk::softmax_combine_backward_cuda), ReleaseGil(),
             arg("grad_logits"), arg("gate_logits"), arg("expert_logits"), arg("grad_gate_logits"),
             arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"), dtype, stream);
  module.def("softmax_combine_cross_entropy_cuda", wrap(mk::softmax_combine_cross_entropy_cuda),
             ReleaseGil(), arg("gate_logits"), arg("expert_logits"), arg("labels"), arg("loss"),
             arg("grad_gate_logits"), arg("grad_expert_logits"), arg("B"), arg("E"), arg("K"),
             dtype, stream);
  module.def("linf_step_cuda", wrap(mk::linf_step_cuda), ReleaseGil(), arg("adversarial"),
             arg("grad"), arg("images"), arg("epsilon"), arg("step_size"), arg("B"), arg("P"),
             arg("low"), arg("high"), dtype, stream);
#ifdef MOE_KERNELS_SM90A
  module.def("grouped_conv_cuda", wrap(mk::grouped_conv_cuda), ReleaseGil(), arg("source"),
             arg("weight"), arg("side"), arg("side_weight"), arg("bias"), arg("addend"),
             arg("activation"), arg("output"), arg("E"), arg("P"), arg("Q"), arg("N"), arg("O"),
             arg("source_E"), arg("H"), arg("W"), arg("C"), arg("R"), arg("S"), arg("stride"),
             arg("padding"), arg("side_H"), arg("side_W"), arg("D"), arg("side_stride"),
             arg("input_grad"), arg("relu"), dtype, stream);
#endif
#endif
  module.attr("has_cuda") = py::bool_(py::len(cuda_archs) > 0);
  module.attr("cuda_archs") = cuda_archs;
}
