// The planner as Python sees it, under drllm_fast/planner.py, which checks what comes in. The GIL is released while the
// planner works.
#include "plan_module.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "plan.h"

namespace py = pybind11;

namespace drllm_fast::plan {
namespace {

using Int8 = py::array_t<int8_t, py::array::c_style>;

Paths paths_of(const Int8& array) { return {array.data(), array.shape(0), array.shape(1)}; }

// (schedule, kinds, ranks, visits, gathers), fields of DecodePlan. Visits of the same rows share their tuples.
py::tuple decode(const Int8& plan) {
  const Paths paths = paths_of(plan);
  Decoded decoded;
  {
    py::gil_scoped_release release;
    decoded = decode_plan(paths);
  }
  const py::object names[] = {py::str("none"), py::str("all"), py::str("range"), py::str("scattered")};
  std::vector<py::tuple> rows, ranks;
  for (const RowSet& set : decoded.sets) {
    rows.emplace_back(py::cast(set.rows));
    ranks.emplace_back(py::cast(set.rank));
  }
  py::list schedule, kinds, rank_pairs;
  for (size_t visit = 0; visit < decoded.visit.size(); visit += 2) {
    const size_t once = decoded.visit[visit], twice = decoded.visit[visit + 1];
    const auto name = [&](size_t set) { return names[static_cast<int>(decoded.sets[set].kind)]; };
    schedule.append(py::make_tuple(rows[once], rows[twice]));
    kinds.append(py::make_tuple(name(once), name(twice)));
    rank_pairs.append(py::make_tuple(ranks[once], ranks[twice]));
  }
  return py::make_tuple(schedule, kinds, rank_pairs, py::tuple(py::cast(decoded.visits)), decoded.gathers);
}

std::vector<int64_t> order(const Int8& plan) {
  const Paths paths = paths_of(plan);
  py::gil_scoped_release release;
  return order_rows(paths);
}

std::vector<std::vector<int64_t>> group(const Int8& array, int64_t max_batch, const std::vector<double>& visit_cost,
                                        int64_t exact_steps) {
  const Paths paths = paths_of(array);
  py::gil_scoped_release release;
  return group_paths(paths, max_batch, visit_cost, exact_steps);
}

}  // namespace

void add_to(py::module_& module) {
  module.def("decode_plan", &decode, py::arg("plan"));
  module.def("order_rows", &order, py::arg("plan"));
  module.def("group_paths", &group, py::arg("paths"), py::arg("max_batch"), py::arg("visit_cost"),
             py::arg("exact_steps"));
}

}  // namespace drllm_fast::plan
