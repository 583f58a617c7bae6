// The only file that sees Python. Addresses arrive as integers (torch's data_ptr()), the GIL is
// released while a kernel runs, and error codes become RuntimeError. Shapes, dtypes and devices
// were checked by the caller.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

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
#endif
  module.attr("has_cuda") = py::bool_(py::len(cuda_archs) > 0);
  module.attr("cuda_archs") = cuda_archs;
}
