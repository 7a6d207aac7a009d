// The module drllm_fast._C. Importing it registers the kernels below under schemas that drllm_fast/ops.py defines; a
// second definition here would end the process at import.
//
// torch is reached through its stable ABI only, so that one binary serves every torch from TORCH_TARGET_VERSION on. The
// module itself is a plain CPython module: tied to one version of Python, as pybind11 modules are.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(drllm_fast, CPU, m) {
  m.impl("active_tokens", TORCH_BOX(&drllm_fast::cpu::active_tokens));
  m.impl("visit_rows", TORCH_BOX(&drllm_fast::cpu::visit_rows));
  m.impl("gather_rows", TORCH_BOX(&drllm_fast::cpu::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&drllm_fast::cpu::scatter_rows));
  m.impl("scatter_add_rows", TORCH_BOX(&drllm_fast::cpu::scatter_add_rows));
  m.impl("gather_rms_norm", TORCH_BOX(&drllm_fast::cpu::gather_rms_norm));
}

#if defined(__clang__) || defined(__GNUC__)
#define DRLLM_FAST_COMPILER __VERSION__
#else
#define DRLLM_FAST_COMPILER "unknown"
#endif

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of drllm-fast.", -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "backends", "cpu") < 0 ||
      PyModule_AddStringConstant(module, "built_with_torch", TORCH_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "compiler", DRLLM_FAST_COMPILER) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
