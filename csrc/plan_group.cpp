// Batches of rows in which few different visits are run: sum over batches of W(union of its paths), W the cost of a set
// of visits. W never falls and is submodular, so merging two batches that fit into one never costs anything, and
// splitting one never saves anything.
//
// Few rows: exactly, by dynamic programming over what is left. Many: the cheapest of several partitions (the order of
// arrival, the paths sorted, and greedy ones), improved by moving and exchanging paths and by merging batches. Forming
// pairs of batches afresh was tried too: on 10,000 rows 1 s more for less than 0.1 % of the cost.
#include "plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace drllm_fast::plan {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();
// Of sets of visits, after which no other greedy partition is begun, and once more for improving: 0.1 to 0.2 s each.
constexpr int64_t kWeighings = 16'000'000;

int lowest_bit(uint64_t word) {
#ifdef _MSC_VER
  unsigned long bit;
  _BitScanForward64(&bit, word);
  return static_cast<int>(bit);
#else
  return __builtin_ctzll(word);
#endif
}

struct Entry {
  size_t path;
  int64_t copies;
};

// A batch: its paths, each once, and the visits that any, and that exactly one of them runs.
struct Batch {
  std::vector<Entry> entries;
  int64_t rows = 0;
  std::vector<uint64_t> any, once;
};

using Partition = std::vector<Batch>;

class Grouper {
 public:
  Grouper(const Distinct& paths, int64_t max_batch, const std::vector<double>& visit_cost)
      : paths_(paths), max_batch_(max_batch), cost_(visit_cost) {
    for (size_t path = 0; path < paths.size(); ++path) {
      const uint64_t* p = paths[path];
      heaviest_.push_back({path, static_cast<int64_t>(paths.rows[path].size())});
      weight_.push_back(weigh([&](size_t w) { return p[w]; }));
    }
    std::stable_sort(heaviest_.begin(), heaviest_.end(),
                     [&](const Entry& a, const Entry& b) { return weight_[a.path] > weight_[b.path]; });
    // Sums of costs are rounded, and a change that saves nothing must not go back and forth.
    epsilon_ = 1e-9 * std::accumulate(visit_cost.begin(), visit_cost.end(), 0.0);
  }

  // Most of a batch's cost is known once its heaviest path is, so that one begins it. Then always what adds least; of
  // several such paths the heaviest, which would cost most elsewhere. `eager` times its whole cost is taken off, which
  // favours heavy paths.
  Partition greedy(double eager, int64_t& budget) const {
    Partition partition;
    for (std::vector<Entry> left = heaviest_; !left.empty();) {
      Batch batch = empty();
      take(batch, left[0]);
      bool grows = true;
      while (grows && batch.rows < max_batch_) {
        Entry* next = nullptr;
        budget -= static_cast<int64_t>(left.size());
        double best = kInfinite;
        for (Entry& entry : left) {
          if (entry.copies == 0) continue;
          const uint64_t* p = paths_[entry.path];
          const double limit = best + eager * weight_[entry.path];
          const double growth = weigh([&](size_t w) { return p[w] & ~batch.any[w]; }, limit);
          if (growth == 0)
            take(batch, entry);
          else if (growth < limit)
            best = growth - eager * weight_[entry.path], next = &entry;
          if (batch.rows == max_batch_) break;
        }
        grows = next != nullptr;
        if (grows && batch.rows < max_batch_) take(batch, *next);
      }
      left.erase(std::remove_if(left.begin(), left.end(), [](const Entry& e) { return e.copies == 0; }), left.end());
      partition.push_back(std::move(batch));
    }
    return partition;
  }

  // One batch after the other, full.
  Partition in_turn(const std::vector<Entry>& order) const {
    Partition partition;
    for (Entry entry : order) {
      while (entry.copies > 0) {
        if (partition.empty() || partition.back().rows == max_batch_) partition.push_back(empty());
        take(partition.back(), entry);
      }
    }
    return partition;
  }

  const std::vector<Entry>& heaviest() const { return heaviest_; }

  double cost(const Partition& partition) const {
    double sum = 0;
    for (const Batch& batch : partition) sum += weigh([&](size_t w) { return batch.any[w]; });
    return sum;
  }

  // Until nothing helps or the budget is spent.
  void improve(Partition& partition, int64_t& budget) const {
    for (bool changed = true; changed && budget > 0;) {
      changed = false;
      for (size_t a = 0; a < partition.size(); ++a)
        for (size_t i = 0; i < partition[a].entries.size() && budget > 0; ++i)
          changed = relocate(partition, a, i, budget) || changed;
      changed = merge(partition) || changed;
    }
  }

  // Dynamic programming over what is left of each path: best[left] = min over batches out of `left` that hold a copy of
  // its last path. `left` is a number with a digit for each path.
  Partition exact() const {
    const size_t count = paths_.size();
    std::vector<double> union_weight(size_t{1} << count);
    for (size_t set = 0; set < union_weight.size(); ++set)
      union_weight[set] = weigh([&](size_t w) {
        uint64_t word = 0;
        for (size_t path = 0; path < count; ++path)
          if (set >> path & 1) word |= paths_[path][w];
        return word;
      });
    std::vector<size_t> place(count, 1);
    for (size_t path = 1; path < count; ++path) place[path] = place[path - 1] * (paths_.rows[path - 1].size() + 1);
    const size_t states = place.back() * (paths_.rows.back().size() + 1);
    const auto digit = [&](size_t left, size_t path) {
      return static_cast<int64_t>(left / place[path] % (paths_.rows[path].size() + 1));
    };
    std::vector<double> best(states, kInfinite);
    std::vector<size_t> first(states);
    best[0] = 0;
    std::vector<int64_t> copies(count);
    for (size_t left = 1; left < states; ++left) {
      size_t last = count - 1;
      while (digit(left, last) == 0) --last;
      // Every batch, counted up digit by digit; those of more than max_batch rows are left out.
      std::fill(copies.begin(), copies.end(), 0);
      copies[last] = 1;
      size_t batch = place[last], set = size_t{1} << last;
      for (int64_t rows = 1;;) {
        const double total = union_weight[set] + best[left - batch];
        if (total < best[left]) best[left] = total, first[left] = batch;
        size_t path = 0;
        while (path <= last && (copies[path] == digit(left, path) || rows == max_batch_)) {
          const int64_t least = path == last;
          rows -= copies[path] - least;
          batch -= place[path] * static_cast<size_t>(copies[path] - least);
          copies[path] = least;
          if (!least) set &= ~(size_t{1} << path);
          ++path;
        }
        if (path > last) break;
        ++copies[path], ++rows;
        batch += place[path];
        set |= size_t{1} << path;
      }
    }
    Partition partition;
    for (size_t left = states - 1; left > 0; left -= first[left]) {
      partition.push_back(empty());
      for (size_t path = 0; path < count; ++path)
        if (Entry entry{path, digit(first[left], path)}; entry.copies) take(partition.back(), entry);
    }
    return partition;
  }

  // Batches that fit into one, smallest first, and those that have become empty.
  bool merge(Partition& partition) const {
    const size_t before = partition.size();
    const auto smaller = [](const Batch& a, const Batch& b) { return a.rows < b.rows; };
    std::stable_sort(partition.begin(), partition.end(), smaller);
    while (partition.size() > 1 && partition[0].rows + partition[1].rows <= max_batch_) {
      for (const Entry& entry : partition[0].entries) put(partition[1], entry);
      partition.erase(partition.begin());
      std::stable_sort(partition.begin(), partition.end(), smaller);
    }
    return partition.size() < before;
  }

 private:
  // The cost of the visits word(0), word(1), ...; or some number above the limit.
  template <class Word>
  double weigh(const Word& word, double limit = kInfinite) const {
    double sum = 0;
    for (size_t w = 0; w < paths_.words; ++w) {
      for (uint64_t rest = word(w); rest; rest &= rest - 1) sum += cost_[64 * w + lowest_bit(rest)];
      if (sum > limit) break;
    }
    return sum;
  }

  Batch empty() const { return {{}, 0, std::vector<uint64_t>(paths_.words), std::vector<uint64_t>(paths_.words)}; }

  // As many copies as fit go from the entry into the batch.
  void take(Batch& batch, Entry& entry) const {
    const int64_t copies = std::min(entry.copies, max_batch_ - batch.rows);
    put(batch, {entry.path, copies});
    entry.copies -= copies;
  }

  void put(Batch& batch, const Entry& entry) const {
    batch.rows += entry.copies;
    for (Entry& known : batch.entries) {
      if (known.path != entry.path) continue;
      known.copies += entry.copies;
      return;
    }
    batch.entries.push_back(entry);
    const uint64_t* p = paths_[entry.path];
    for (size_t w = 0; w < paths_.words; ++w) {
      batch.once[w] = (batch.once[w] & ~p[w]) | (p[w] & ~batch.any[w]);
      batch.any[w] |= p[w];
    }
  }

  void remove(Batch& batch, const Entry& entry) const {
    Batch rest = empty();
    for (const Entry& known : batch.entries) {
      const int64_t copies = known.copies - (known.path == entry.path ? entry.copies : 0);
      if (copies) put(rest, {known.path, copies});
    }
    batch = std::move(rest);
  }

  // Entry i of batch a goes where it saves most, alone or in exchange for copies of one path.
  bool relocate(Partition& partition, size_t a, size_t i, int64_t& budget) const {
    const Batch& from = partition[a];
    const Entry moved = from.entries[i];
    const uint64_t* p = paths_[moved.path];
    const double gain = weigh([&](size_t w) { return p[w] & from.once[w]; });
    --budget;
    if (gain <= epsilon_) return false;
    double best = -epsilon_;
    size_t to = 0;
    Entry back{};
    for (size_t b = 0; b < partition.size(); ++b) {
      const Batch& into = partition[b];
      if (b == a) continue;
      const double added = weigh([&](size_t w) { return p[w] & ~into.any[w]; });
      budget -= 2;
      const int64_t excess = std::max<int64_t>(0, into.rows + moved.copies - max_batch_);
      if (excess == 0 && added - gain < best) best = added - gain, to = b, back = {};
      if (added - gain - weigh([&](size_t w) { return into.once[w]; }) >= best) continue;
      const int64_t room = max_batch_ - from.rows + moved.copies;
      for (const Entry& other : into.entries) {
        if (other.path == moved.path) continue;
        const bool whole = other.copies <= room;
        const int64_t copies = whole ? other.copies : excess;
        if (copies < std::max<int64_t>(1, excess) || copies > room) continue;
        const uint64_t* q = paths_[other.path];
        budget -= 3;
        double change = added - weigh([&](size_t w) { return p[w] & from.once[w] & ~q[w]; });
        if (whole) change -= weigh([&](size_t w) { return q[w] & into.once[w] & ~p[w]; });
        if (change < best) change += weigh([&](size_t w) { return q[w] & ~from.any[w]; });
        if (change < best) best = change, to = b, back = {other.path, copies};
      }
    }
    if (best == -epsilon_) return false;
    remove(partition[a], moved);
    if (back.copies) {
      remove(partition[to], back);
      put(partition[a], back);
    }
    put(partition[to], moved);
    return true;
  }

  const Distinct& paths_;
  const int64_t max_batch_;
  const std::vector<double>& cost_;
  std::vector<double> weight_;
  std::vector<Entry> heaviest_;
  double epsilon_;
};

// Pairs of what is left and of a batch out of it, or `most` + 1 if there are more than that.
int64_t steps(const Distinct& paths, int64_t most) {
  int64_t product = 1;
  for (const auto& rows : paths.rows) {
    const auto count = static_cast<int64_t>(rows.size());
    product *= (count + 1) * (count + 2) / 2;
    if (product > most) return most + 1;
  }
  return product;
}

Partition best_partition(const Grouper& grouper, const Distinct& distinct, const Paths& paths) {
  std::vector<Entry> arrival(paths.rows), sorted;
  for (size_t path = 0; path < distinct.size(); ++path)
    for (const int64_t row : distinct.rows[path]) arrival[row] = {path, 1};
  for (size_t path = 0; path < distinct.size(); ++path)
    sorted.push_back({path, static_cast<int64_t>(distinct.rows[path].size())});
  const auto values = [&](const Entry& e) { return paths.values + distinct.rows[e.path][0] * paths.layers; };
  std::sort(sorted.begin(), sorted.end(), [&](const Entry& a, const Entry& b) {
    return std::lexicographical_compare(values(a), values(a) + paths.layers, values(b), values(b) + paths.layers);
  });

  std::vector<std::pair<double, Partition>> tried;
  const auto attempt = [&](Partition partition) { tried.emplace_back(grouper.cost(partition), std::move(partition)); };
  int64_t budget = kWeighings;
  for (const double eager : {0.0, 0.25, 0.5, 1.0})
    if (budget > 0) attempt(grouper.greedy(eager, budget));
  attempt(grouper.in_turn(sorted));
  attempt(grouper.in_turn(grouper.heaviest()));
  attempt(grouper.in_turn(arrival));
  std::stable_sort(tried.begin(), tried.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  budget = kWeighings;
  for (auto& [cost, partition] : tried) {
    grouper.improve(partition, budget);
    cost = grouper.cost(partition);
  }
  return std::min_element(tried.begin(), tried.end(), [](const auto& a, const auto& b) { return a.first < b.first; })
      ->second;
}

}  // namespace

std::vector<std::vector<int64_t>> group_paths(const Paths& paths, int64_t max_batch,
                                              const std::vector<double>& visit_cost, int64_t exact_steps) {
  if (paths.rows == 0) return {};
  const Distinct distinct(paths);
  const Grouper grouper(distinct, max_batch, visit_cost);
  Partition partition = steps(distinct, exact_steps) <= exact_steps ? grouper.exact()
                                                                    : best_partition(grouper, distinct, paths);
  grouper.merge(partition);
  std::vector<size_t> used(distinct.size());
  std::vector<std::vector<int64_t>> batches;
  for (const Batch& batch : partition) {
    std::vector<int64_t> rows;
    for (const Entry& entry : batch.entries)
      for (int64_t copy = 0; copy < entry.copies; ++copy)
        rows.push_back(distinct.rows[entry.path][used[entry.path]++]);
    std::sort(rows.begin(), rows.end());
    batches.push_back(std::move(rows));
  }
  std::sort(batches.begin(), batches.end());  // who came first is in the first batch
  return batches;
}

}  // namespace drllm_fast::plan
