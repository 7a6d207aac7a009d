// Adds the planner's functions to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace drllm_fast::plan {

void add_to(pybind11::module_& module);

}  // namespace drllm_fast::plan
