// The functions of layers.h for Python.
#include <pybind11/pybind11.h>

#include <utility>

#include "cpu/layers.h"
#include "wrap.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace py = pybind11;

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {

void bind_layers(py::module_& module) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  const auto num_threads = arg("num_threads") = 0;  // 0: as many as OpenMP likes

  for (const auto& [name, kernel] :
       {std::pair{"conv_direct", conv_direct}, std::pair{"conv_winograd", conv_winograd}}) {
    module.def(name, wrap(kernel), ReleaseGil(), arg("source"), arg("weight"), arg("side"),
               arg("side_weight"), arg("bias"), arg("addend"), arg("activation"), arg("output"),
               arg("sizes"), arg("relu"), arg("float32_output"), arg("dtype"), num_threads);
  }
  module.def("conv_depthwise", wrap(conv_depthwise), ReleaseGil(), arg("source"), arg("weight"),
             arg("bias"), arg("addend"), arg("activation"), arg("output"), arg("sizes"),
             arg("relu"), arg("dtype"), num_threads);
  module.def("scale_shift", wrap(scale_shift), ReleaseGil(), arg("source"), arg("scale"),
             arg("second"), arg("second_scale"), arg("shift"), arg("addend"), arg("activation"),
             arg("output"), arg("rows"), arg("C"), arg("relu"), arg("dtype"), num_threads);
  module.def("channel_sums", wrap(channel_sums), ReleaseGil(), arg("factor"), arg("source"),
             arg("shift"), arg("sums"), arg("products"), arg("rows"), arg("C"), arg("dtype"),
             num_threads);
  module.def("batch_norm", wrap(batch_norm), ReleaseGil(), arg("source"), arg("weight"),
             arg("bias"), arg("running_mean"), arg("running_variance"), arg("numbers"),
             arg("affine"), arg("rows"), arg("C"), arg("channels"), arg("epsilon"), arg("momentum"),
             arg("dtype"), num_threads);
  module.def("batch_norm_backward", wrap(batch_norm_backward), ReleaseGil(), arg("grad"),
             arg("source"), arg("numbers"), arg("grad_weight"), arg("grad_bias"), arg("affine"),
             arg("rows"), arg("C"), arg("channels"), arg("dtype"), num_threads);
  module.def("weight_grad", wrap(weight_grad), ReleaseGil(), arg("source"), arg("grad"),
             arg("grad_weight"), arg("sizes"), arg("dtype"), num_threads);
  module.def("weight_grad_winograd", wrap(weight_grad_winograd), ReleaseGil(), arg("source"),
             arg("grad"), arg("grad_weight"), arg("sizes"), arg("outputs"), arg("channels"),
             arg("output_stride"), arg("channel_stride"), arg("tap_stride"), arg("dtype"),
             num_threads);
  module.def("layer_norm", wrap(layer_norm), ReleaseGil(), arg("source"), arg("scale"),
             arg("shift"), arg("output"), arg("rows"), arg("C"), arg("channels"), arg("epsilon"),
             arg("dtype"), num_threads);
  module.def("layer_norm_backward", wrap(layer_norm_backward), ReleaseGil(), arg("grad"),
             arg("source"), arg("scale"), arg("addend"), arg("activation"), arg("grad_source"),
             arg("rows"), arg("C"), arg("channels"), arg("epsilon"), arg("dtype"), num_threads);
  module.def("pack_direct", wrap(pack_direct), ReleaseGil(), arg("weight"), arg("packed"), arg("O"),
             arg("K"), arg("outputs"), arg("channels"), arg("taps"), arg("output_stride"),
             arg("channel_stride"), arg("tap_stride"), arg("doubled"), arg("dtype"), num_threads);
  module.def("pack_winograd", wrap(pack_winograd), ReleaseGil(), arg("weight"), arg("forward"),
             arg("gradient"), arg("O"), arg("C"), arg("outputs"), arg("channels"), arg("dtype"),
             num_threads);
  module.def("pool", wrap(pool), ReleaseGil(), arg("source"), arg("output"), arg("sizes"),
             arg("maximum"), arg("dtype"), num_threads);
  module.def("pool_backward", wrap(pool_backward), ReleaseGil(), arg("grad"), arg("source"),
             arg("output"), arg("skip"), arg("activation"), arg("grad_source"), arg("sizes"),
             arg("dtype"), num_threads);
  module.def("pixel_mean", wrap(pixel_mean), ReleaseGil(), arg("source"), arg("mean"),
             arg("pixels"), arg("N"), arg("C"), arg("dtype"), num_threads);
  module.def("pixel_mean_backward", wrap(pixel_mean_backward), ReleaseGil(), arg("grad"),
             arg("activation"), arg("grad_source"), arg("pixels"), arg("N"), arg("C"), arg("dtype"),
             num_threads);
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
