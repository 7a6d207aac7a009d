// What a forward needs to know about a plan, and the different paths in it.
#include "plan.h"

#include <map>
#include <string_view>
#include <unordered_map>

namespace drllm_fast::plan {

Distinct::Distinct(const Paths& paths) : words(static_cast<size_t>(2 * paths.layers + 63) / 64) {
  std::unordered_map<std::string_view, size_t> known;
  for (int64_t row = 0; row < paths.rows; ++row) {
    const int8_t* path = paths.values + row * paths.layers;
    const std::string_view key(reinterpret_cast<const char*>(path), static_cast<size_t>(paths.layers));
    const auto [found, is_new] = known.emplace(key, rows.size());
    if (is_new) {
      rows.emplace_back();
      const size_t at = bits.size();
      bits.resize(at + words);
      for (int64_t layer = 0; layer < paths.layers; ++layer) {
        const uint64_t passes = (uint64_t{1} << path[layer]) - 1;  // 0, 01 or 11
        bits[at + layer / 32] |= passes << (2 * (layer % 32));
      }
    }
    rows[found->second].push_back(row);
  }
}

Decoded decode_plan(const Paths& paths) {
  Decoded out;
  out.visits.resize(paths.rows);
  out.gathers = 0;
  std::map<std::vector<int64_t>, size_t> known;
  for (int64_t layer = 0; layer < paths.layers; ++layer) {
    for (int8_t pass = 1; pass <= 2; ++pass) {
      std::vector<int64_t> rows;
      for (int64_t row = 0; row < paths.rows; ++row)
        if (paths.values[row * paths.layers + layer] >= pass) rows.push_back(row);
      for (const int64_t row : rows) ++out.visits[row];
      const auto [found, is_new] = known.emplace(rows, out.sets.size());
      if (is_new) {
        const auto count = static_cast<int64_t>(rows.size());
        Kind kind = Kind::scattered;
        if (count == 0)
          kind = Kind::none;
        else if (count == paths.rows)
          kind = Kind::all;
        else if (rows.back() - rows.front() + 1 == count)
          kind = Kind::range;
        std::vector<int64_t> rank(paths.rows, -1);
        for (int64_t i = 0; i < count; ++i) rank[rows[i]] = i;
        out.sets.push_back({std::move(rows), std::move(rank), kind});
      }
      out.visit.push_back(found->second);
      out.gathers += out.sets[found->second].kind == Kind::scattered;
    }
  }
  return out;
}

}  // namespace drllm_fast::plan
