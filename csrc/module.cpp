// Python's view of the CPU kernels. Tensors cross as addresses, so that one build works with every torch.
#include <pybind11/pybind11.h>

#include "noise.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "C++ kernels for CPUs; undo_kernels.cpu checks and converts their arguments.";
  module.def(
      "noise_uniform_f32",
      [](uintptr_t address, int64_t count, uint64_t start, uint64_t seed, uint64_t hashed, float k, float c) {
        py::gil_scoped_release released;
        undo::noise_uniform_f32(reinterpret_cast<float*>(address), count, start, seed, hashed, k, c);
      },
      py::arg("address"), py::arg("count"), py::arg("start"), py::arg("seed"), py::arg("hashed"), py::arg("k"), py::arg("c"));
}
