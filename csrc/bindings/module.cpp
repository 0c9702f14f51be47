// What Python needs of the native code besides the ops: the instruction sets found and in use, the probes, and plans.
// Nothing of torch is used here. Its copy of pybind11 refuses, up to torch 2.11, files that name the stable ABI.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <new>

#include "../common/isa.h"
#include "../probes/probes.h"
#include "plan.h"

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

// Runs the plan in the capsule with addresses; gives whether it ran. Without pybind11, which would take as long as the
// kernel of a small call.
PyObject* run_plan(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
  const auto* plan = static_cast<const pynlp::Plan*>(PyCapsule_GetPointer(capsule, nullptr));
  constexpr Py_ssize_t MOST = 32;
  uintptr_t addresses[MOST];
  if (count != static_cast<Py_ssize_t>(plan->count()) || count > MOST) {
    PyErr_SetString(PyExc_ValueError, "plan: expected an address for each tensor");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; ++i) addresses[i] = PyLong_AsUnsignedLongLong(arguments[i]);
  if (PyErr_Occurred()) return nullptr;
  bool ran = false;
  std::exception_ptr failure;
  Py_BEGIN_ALLOW_THREADS;
  try {
    ran = plan->run(addresses);
  } catch (...) {
    failure = std::current_exception();
  }
  Py_END_ALLOW_THREADS;
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return PyBool_FromLong(ran);
}

void start_plan() {
  delete pynlp::Plan::recording();
  pynlp::Plan::recording() = new pynlp::Plan;
}

// The function that makes the call again, and for each of its tensors whether it may be null; None if there is no plan.
py::object finish_plan() {
  std::unique_ptr<pynlp::Plan> plan(pynlp::Plan::recording());
  pynlp::Plan::recording() = nullptr;
  if (!plan || !plan->is_whole()) return py::none();
  py::list optional;
  for (size_t i = 0; i < plan->count(); ++i) optional.append(plan->is_optional(i));
  static PyMethodDef method = {"run_plan", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_plan)),
                               METH_FASTCALL, "Makes the call with addresses, one for each tensor; False: one is 0."};
  py::capsule capsule(plan.release(), [](void* kept) { delete static_cast<pynlp::Plan*>(kept); });
  return py::make_tuple(py::reinterpret_steal<py::object>(PyCFunction_New(&method, capsule.ptr())), optional);
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

  m.def("start_plan", &start_plan, "Keep what calls on this thread run.");
  m.def("finish_plan", &finish_plan, "A function that makes the call again, and which tensors it may lack; or None.");

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("peak_fma", &pynlp::peak_fma, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_bf16_dot", &pynlp::peak_bf16_dot, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_int8_dot", &pynlp::peak_int8_dot, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_bf16_tile", &pynlp::peak_bf16_tile, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("peak_int8_tile", &pynlp::peak_int8_tile, py::arg("threads"), py::arg("seconds"), unlocked);
  m.def("read_bandwidth", &pynlp::read_bandwidth, py::arg("threads"), py::arg("seconds"), py::arg("bytes"), unlocked);
  m.def("copy_bandwidth", &pynlp::copy_bandwidth, py::arg("threads"), py::arg("seconds"), py::arg("bytes"), unlocked);
}
