// The module drllm_fast._C. Importing it registers the kernels below under schemas that drllm_fast defines in Python; a
// second definition here would end the process at import.
//
// torch is reached through its stable ABI only, so that one binary serves every torch from TORCH_TARGET_VERSION on. The
// module itself is pybind11's, tied to one version of Python.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "cpu/cpu_isa.h"
#include "ops.h"
#include "plan_module.h"

STABLE_TORCH_LIBRARY_IMPL(drllm_fast, CPU, m) {
  m.impl("active_tokens", TORCH_BOX(&drllm_fast::cpu::active_tokens));
  m.impl("visit_rows", TORCH_BOX(&drllm_fast::cpu::visit_rows));
  m.impl("gather_rows", TORCH_BOX(&drllm_fast::cpu::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&drllm_fast::cpu::scatter_rows));
  m.impl("router", TORCH_BOX(&drllm_fast::cpu::router));
  m.impl("ragged_attention", TORCH_BOX(&drllm_fast::cpu::ragged_attention));
  m.impl("pack_linear", TORCH_BOX(&drllm_fast::cpu::pack_linear));
  m.impl("packed_linear", TORCH_BOX(&drllm_fast::cpu::packed_linear));
  m.impl("scatter_add_rows", TORCH_BOX(&drllm_fast::cpu::scatter_add_rows));
  m.impl("gather_rms_norm", TORCH_BOX(&drllm_fast::cpu::gather_rms_norm));
}

#if defined(__clang__) || defined(__GNUC__)
#define DRLLM_FAST_COMPILER __VERSION__
#else
#define DRLLM_FAST_COMPILER "unknown"
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels and the planner of drllm-fast.";
  module.attr("backends") = "cpu";
  module.attr("built_with_torch") = TORCH_VERSION;
  module.attr("compiler") = DRLLM_FAST_COMPILER;
  // A function, so that a wrong DRLLM_FAST_ISA is an error where kernels are used, and not a reason to do without them.
  module.def("isa", [] { return drllm_fast::cpu::name(drllm_fast::cpu::isa()); },
             "The instruction set that the CPU kernels run with.");
  drllm_fast::plan::add_to(module);
}
