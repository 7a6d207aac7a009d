// Planning on the host, over layer paths int8 [N, L] of 0 skip, 1 execute, 2 repeat. No torch and no Python in here.
// Meaning and oracle: drllm_fast/planner.py and planner_reference.py.
//
// Visit 2 * l + n is pass n of layer l. A path is the set of the visits that it runs, kept as bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace drllm_fast::plan {

using std::size_t;

struct Paths {
  const int8_t* values;  // row-major
  int64_t rows, layers;
};

enum class Kind { none, all, range, scattered };  // in the order of KINDS in planner_reference.py

struct RowSet {
  std::vector<int64_t> rows, rank;  // rank[row] = its place in rows, or -1
  Kind kind;
};

struct Decoded {
  std::vector<RowSet> sets;     // different ones, by first appearance
  std::vector<size_t> visit;    // [2L], its set
  std::vector<int64_t> visits;  // [N], how many each row runs
  int64_t gathers;              // visits whose rows are scattered
};

Decoded decode_plan(const Paths& paths);
std::vector<int64_t> order_rows(const Paths& paths);
// visit_cost [2L]. Solved exactly where that takes at most exact_steps.
std::vector<std::vector<int64_t>> group_paths(const Paths& paths, int64_t max_batch,
                                              const std::vector<double>& visit_cost, int64_t exact_steps);

// The different paths among the rows, by first appearance.
struct Distinct {
  explicit Distinct(const Paths& paths);
  const uint64_t* operator[](size_t path) const { return bits.data() + path * words; }
  size_t size() const { return rows.size(); }

  size_t words;
  std::vector<uint64_t> bits;              // [size, words]
  std::vector<std::vector<int64_t>> rows;  // which rows have it, ascending
};

}  // namespace drllm_fast::plan
