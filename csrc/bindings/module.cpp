// What Python needs of the native code besides the ops: the instruction sets found and in use, and the probes.
// Nothing of torch is used here. Its copy of pybind11 refuses, up to torch 2.11, files that name the stable ABI.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include "../common/isa.h"
#include "../probes/probes.h"

namespace py = pybind11;

namespace {

py::dict as_dict(const pynlp::Features& f) {
  py::dict features;
  features["avx2"] = f.avx2;
  features["avx_vnni"] = f.avx_vnni;
  features["avx512"] = f.avx512;
  features["avx512_vnni"] = f.avx512_vnni;
  features["avx512_bf16"] = f.avx512_bf16;
  features["amx_tile"] = f.amx_tile;
  features["amx_int8"] = f.amx_int8;
  features["amx_bf16"] = f.amx_bf16;
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU code of pynlp; importing it registers the CPU kernels of the ops.";

  py::enum_<pynlp::Isa>(m, "Isa", "Levels of instruction sets, each with all of those before it.")
      .value("portable", pynlp::Isa::portable)
      .value("avx2", pynlp::Isa::avx2)
      .value("avx512", pynlp::Isa::avx512)
      .value("avx512_bf16_vnni", pynlp::Isa::avx512_bf16_vnni);
  m.def("detected_features", [] { return as_dict(pynlp::detected_features()); }, "What this CPU has.");
  m.def("features", [] { return as_dict(pynlp::features()); }, "What the kernels may use.");
  m.def("isa", &pynlp::isa, "The level in use.");
  m.def("set_isa", &pynlp::set_isa, py::arg("highest"), "Use no feature above this level from now on.");

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("peak_fma", &pynlp::peak_fma, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_bf16_dot", &pynlp::peak_bf16_dot, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_int8_dot", &pynlp::peak_int8_dot, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_bf16_tile", &pynlp::peak_bf16_tile, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_int8_tile", &pynlp::peak_int8_tile, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("read_bandwidth", &pynlp::read_bandwidth, py::arg("threads"), py::arg("seconds"), py::arg("bytes"), unlocked);
  m.def("copy_bandwidth", &pynlp::copy_bandwidth, py::arg("threads"), py::arg("seconds"), py::arg("bytes"), unlocked);
}
