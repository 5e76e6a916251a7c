// Python's view of the CPU kernels. Tensors cross as addresses, so that one build works with every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bf16_product.h"
#include "noise.h"
#include "vocab_loss.h"

namespace py = pybind11;

namespace {

template <class T, class C>
void address(C& type, const char* name, T* undo::Chunk::* member) {
  type.def_property(
      name, [member](const undo::Chunk& c) { return reinterpret_cast<uintptr_t>(c.*member); },
      [member](undo::Chunk& c, uintptr_t value) { c.*member = reinterpret_cast<T*>(value); });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using undo::Chunk;
  using undo::Shape;
  module.attr("SOURCES") = UNDO_SOURCES;
  module.doc() = "C++ kernels for CPUs; undo_kernels.cpu checks and converts their arguments.";
  py::enum_<undo::Law>(module, "Law")
      .value("uniform", undo::Law::UNIFORM)
      .value("normal", undo::Law::NORMAL)
      .value("constant", undo::Law::CONSTANT);
  py::enum_<undo::Type>(module, "Type")
      .value("float32", undo::Type::FLOAT32)
      .value("bfloat16", undo::Type::BFLOAT16)
      .value("float16", undo::Type::FLOAT16)
      .value("float64", undo::Type::FLOAT64);
  py::class_<undo::Segment>(module, "Segment")
      .def(py::init([](uintptr_t address, int64_t count, undo::Type type, undo::Law law, uint64_t hashed, double keep, double scale,
                       int64_t first, int64_t run, int64_t stride) {
        return undo::Segment{reinterpret_cast<void*>(address), count, type, law, hashed, keep, scale, first, run, stride};
      }));
  module.def("noise", [](const std::string& set, const std::vector<undo::Segment>& segments, uint64_t seed, bool stochastic) {
    py::gil_scoped_release released;
    std::vector<std::array<double, 3>> sums;
    for (const undo::Sums& s : undo::noise(undo::noise_kernels(set.c_str()), segments, seed, stochastic))
      sums.push_back({s.before, s.noise, s.after});
    return sums;
  });
  module.def("philox", [](const std::string& set, uint64_t seed, uint64_t hashed, uint32_t stream, uint64_t block) {
    std::array<uint32_t, 4> words;
    undo::noise_kernels(set.c_str()).words(seed, hashed, stream, block, words.data());
    return words;
  });

  module.attr("PRODUCT_TOKENS") = undo::PRODUCT_TOKENS;
  module.attr("PRODUCT_DEPTH") = undo::PRODUCT_DEPTH;
  py::class_<undo::Bf16Product>(module, "Bf16Product")
      .def_readonly("name", &undo::Bf16Product::name)
      .def_readonly("vectors", &undo::Bf16Product::vectors)
      .def_readonly("emulated", &undo::Bf16Product::emulated);
  module.def("bf16_products", &undo::bf16_products, py::return_value_policy::reference);
  module.def("bf16_project", [](const std::string& name, uintptr_t weight, int64_t stride_w, int64_t rows, uintptr_t packed,
                                int64_t tokens, int64_t width, uintptr_t z, int64_t stride_z) {
    py::gil_scoped_release released;
    undo::bf16_project(undo::bf16_product(name.c_str()), reinterpret_cast<const uint16_t*>(weight), stride_w, rows,
                       {reinterpret_cast<const uint32_t*>(packed), tokens, width}, reinterpret_cast<float*>(z), stride_z);
  });

  module.attr("WIDEST") = undo::WIDEST;
  module.attr("BLOCK") = undo::BLOCK;
  module.attr("FIELDS") = int(undo::FIELDS);
  py::enum_<undo::Field>(module, "Field")
      .value("M_S", undo::M_S)
      .value("L_S", undo::L_S)
      .value("M_T", undo::M_T)
      .value("L_T", undo::L_T)
      .value("DIFFERENCE", undo::DIFFERENCE)
      .value("CROSS", undo::CROSS)
      .value("ENERGY", undo::ENERGY)
      .value("TOP_S", undo::TOP_S)
      .value("TOP_T", undo::TOP_T)
      .value("LABEL", undo::LABEL)
      .value("VALUE", undo::VALUE)
      .value("MIXED", undo::MIXED);
  py::enum_<undo::Target>(module, "Target")
      .value("own", undo::OWN)
      .value("forward", undo::FORWARD)
      .value("reverse", undo::REVERSE)
      .value("jsd", undo::JSD);
  py::enum_<undo::Kind>(module, "Kind")
      .value("float32", undo::FLOAT32)
      .value("bfloat16", undo::BFLOAT16)
      .value("float16", undo::FLOAT16);
  py::class_<Shape>(module, "Shape")
      .def(py::init<>())
      .def_readwrite("scale", &Shape::scale)
      .def_readwrite("cap", &Shape::cap)
      .def_readwrite("temperature", &Shape::temperature)
      .def_property(
          "bias", [](const Shape& s) { return reinterpret_cast<uintptr_t>(s.bias); },
          [](Shape& s, uintptr_t value) { s.bias = reinterpret_cast<const float*>(value); });
  py::class_<Chunk> chunk(module, "Chunk");
  chunk.def(py::init<>())
      .def_readwrite("tokens", &Chunk::tokens)
      .def_readwrite("stride", &Chunk::stride)
      .def_readwrite("leading", &Chunk::leading)
      .def_readwrite("target", &Chunk::target)
      .def_readwrite("uniform", &Chunk::uniform)
      .def_readwrite("statistics", &Chunk::statistics)
      .def_readwrite("own_term", &Chunk::own_term)
      .def_readwrite("beta", &Chunk::beta)
      .def_readwrite("other", &Chunk::other)
      .def_readwrite("student", &Chunk::student)
      .def_readwrite("teacher", &Chunk::teacher)
      .def_readwrite("known", &Chunk::known)
      .def_readwrite("picking", &Chunk::picking);
  address(chunk, "state", &Chunk::state);
  address(chunk, "partial", &Chunk::partial);
  address(chunk, "base_s", &Chunk::base_s);
  address(chunk, "base_t", &Chunk::base_t);
  address(chunk, "log_sum_s", &Chunk::log_sum_s);
  address(chunk, "log_sum_t", &Chunk::log_sum_t);
  address(chunk, "gap", &Chunk::gap);
  address(chunk, "offset", &Chunk::offset);
  address(chunk, "weight", &Chunk::weight);
  address(chunk, "own", &Chunk::own);
  address(chunk, "labels", &Chunk::labels);
  address(chunk, "label_weight", &Chunk::label_weight);
  address(chunk, "indices", &Chunk::indices);
  address(chunk, "picked", &Chunk::picked);

  module.def("instruction_set", [](const std::string& wanted) { return undo::loss_kernels(wanted.c_str()).name; });
  module.def("shape", [](const std::string& set, const Chunk& c, uintptr_t z, bool student, int64_t first, int64_t entries) {
    py::gil_scoped_release released;
    undo::loss_kernels(set.c_str()).shape(c, reinterpret_cast<float*>(z), student ? c.student : c.teacher, student, first, entries);
  });
  module.def("stats", [](const std::string& set, const Chunk& c, uintptr_t z_s, uintptr_t z_t, int64_t first, int64_t entries) {
    py::gil_scoped_release released;
    undo::loss_kernels(set.c_str()).stats(c, reinterpret_cast<float*>(z_s), reinterpret_cast<float*>(z_t), first, entries, false);
  });
  module.def("loss", [](const std::string& set, const Chunk& c, uintptr_t z_s, uintptr_t z_t, int64_t first, int64_t entries,
                        bool gradient) {
    py::gil_scoped_release released;
    undo::loss_kernels(set.c_str())
        .loss(c, reinterpret_cast<float*>(z_s), reinterpret_cast<const float*>(z_t), first, entries, gradient);
  });

  module.def(
      "rmu_loss",
      [](const std::string& set, int64_t tokens, int64_t width, uintptr_t hidden, int hidden_kind, int64_t stride_hidden,
         uintptr_t target, int target_kind, int64_t stride_target, float coefficient, uintptr_t factor, uintptr_t gradient,
         uintptr_t partial) {
        py::gil_scoped_release released;
        undo::Rmu c;
        c.tokens = tokens;
        c.width = width;
        c.hidden = reinterpret_cast<const void*>(hidden);
        c.target = reinterpret_cast<const void*>(target);
        c.hidden_kind = hidden_kind;
        c.target_kind = target_kind;
        c.stride_hidden = stride_hidden;
        c.stride_target = stride_target;
        c.coefficient = coefficient;
        c.factor = reinterpret_cast<const float*>(factor);
        c.gradient = reinterpret_cast<void*>(gradient);
        c.partial = reinterpret_cast<double*>(partial);
        return undo::loss_kernels(set.c_str()).rmu(c);
      },
      py::arg("set"), py::arg("tokens"), py::arg("width"), py::arg("hidden"), py::arg("hidden_kind"), py::arg("stride_hidden"),
      py::arg("target"), py::arg("target_kind"), py::arg("stride_target"), py::arg("coefficient"), py::arg("factor"),
      py::arg("gradient"), py::arg("partial"));
}
