// An order of the rows in which few runs of active rows are left: a shortest tour through the different paths, from the
// empty path back to it, in Hamming distance.
#include "plan.h"

#include <algorithm>
#include <bitset>
#include <limits>
#include <numeric>

namespace drllm_fast::plan {
namespace {

constexpr size_t kExact = 10;                    // different paths that are ordered exactly
constexpr int64_t kDistances = 40'000'000;       // that a tour may ask for while it is improved, about 0.2 s
constexpr int64_t kStarts = 8, kSegment = 3;     // tours by nearest neighbour; paths that are moved together
constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 2;

using Tour = std::vector<size_t>;  // the number of different paths stands for the empty path, at both ends

struct Distances {
  int64_t operator()(size_t i, size_t j) const {
    int64_t bits = 0;
    for (size_t w = 0; w < paths.words; ++w) bits += std::bitset<64>(word(i, w) ^ word(j, w)).count();
    return bits;
  }
  uint64_t word(size_t i, size_t w) const { return i == paths.size() ? 0 : paths[i][w]; }

  int64_t length(const Tour& tour) const {
    int64_t sum = 0;
    for (size_t i = 1; i < tour.size(); ++i) sum += (*this)(tour[i - 1], tour[i]);
    return sum;
  }

  const Distinct& paths;
};

// Held and Karp, from the end backwards, so that the first of all shortest tours can be read off forwards.
Tour shortest(const Distances& distance, size_t count) {
  const size_t all = (size_t{1} << count) - 1;
  std::vector<int64_t> between((count + 1) * (count + 1));
  for (size_t i = 0; i <= count; ++i)
    for (size_t j = 0; j <= count; ++j) between[i * (count + 1) + j] = distance(i, j);
  std::vector<int64_t> rest((all + 1) * (count + 1), kFar);  // [visited, last] -> what is still to go
  const auto step = [&](size_t done, size_t last, size_t next) {
    return between[last * (count + 1) + next] + rest[(done | size_t{1} << next) * (count + 1) + next];
  };
  for (size_t done = all + 1; done-- > 0;) {
    for (size_t last = 0; last <= count; ++last) {
      int64_t& best = rest[done * (count + 1) + last];
      if (done == all) best = between[last * (count + 1) + count];
      for (size_t next = 0; next < count; ++next)
        if (!(done >> next & 1)) best = std::min(best, step(done, last, next));
    }
  }
  Tour tour{count};
  for (size_t done = 0; done != all; done |= size_t{1} << tour.back()) {
    size_t next = 0;
    while ((done >> next & 1) || step(done, tour.back(), next) != rest[done * (count + 1) + tour.back()]) ++next;
    tour.push_back(next);
  }
  tour.push_back(count);
  return tour;
}

Tour nearest_neighbours(const Distances& distance, size_t count, size_t first) {
  Tour tour{count, first}, left(count);
  std::iota(left.begin(), left.end(), size_t{0});
  left.erase(left.begin() + static_cast<int64_t>(first));
  while (!left.empty()) {
    auto nearest = left.begin();
    int64_t best = kFar;
    for (auto at = left.begin(); at != left.end(); ++at) {
      const int64_t away = distance(tour.back(), *at);
      if (away < best) best = away, nearest = at;
    }
    tour.push_back(*nearest);
    left.erase(nearest);
  }
  tour.push_back(count);
  return tour;
}

// 2-opt (reverse a part) and or-opt (move up to kSegment paths, either way round), until neither helps.
void improve(const Distances& distance, Tour& tour, int64_t& budget) {
  const auto count = static_cast<int64_t>(tour.size()) - 2;
  const auto at = [&](int64_t i) { return tour.begin() + i; };
  for (bool changed = true; changed && budget > 0;) {
    changed = false;
    for (int64_t i = 1; i <= count && budget > 0; ++i) {
      for (int64_t j = i + 1; j <= count; ++j) {
        const int64_t now = distance(tour[i - 1], tour[i]) + distance(tour[j], tour[j + 1]);
        const int64_t then = distance(tour[i - 1], tour[j]) + distance(tour[i], tour[j + 1]);
        if (then >= now) continue;
        std::reverse(at(i), at(j + 1));
        changed = true;
      }
      for (int64_t size = 1; size <= kSegment && i + size <= count + 1; ++size) {
        const size_t first = tour[i], last = tour[i + size - 1];
        const int64_t saved = distance(tour[i - 1], first) + distance(last, tour[i + size]) -
                              distance(tour[i - 1], tour[i + size]);
        for (int64_t j = 0; saved > 0 && j <= count; ++j) {  // to between j and j + 1
          if (i - 1 <= j && j < i + size) continue;
          const int64_t gap = distance(tour[j], tour[j + 1]);
          const int64_t straight = distance(tour[j], first) + distance(last, tour[j + 1]) - gap;
          const int64_t turned = distance(tour[j], last) + distance(first, tour[j + 1]) - gap;
          if (std::min(straight, turned) >= saved) continue;
          if (turned < straight) std::reverse(at(i), at(i + size));
          if (j < i)
            std::rotate(at(j + 1), at(i), at(i + size));
          else
            std::rotate(at(i), at(i + size), at(j + 1));
          changed = true;
          break;
        }
      }
      budget -= 8 * count;
    }
  }
}

Tour short_tour(const Distances& distance, size_t count) {
  int64_t budget = kDistances;
  Tour best(count + 1);
  std::iota(best.begin(), best.end(), size_t{0});
  best.insert(best.begin(), count);  // the given order, equal paths brought together, which lengthens no tour
  const auto per_start = static_cast<int64_t>(count * count / 2);
  const int64_t starts = std::clamp(kDistances / 2 / per_start, int64_t{1}, kStarts);
  std::vector<Tour> tours{best};
  for (int64_t start = 0; start < starts; ++start)
    tours.push_back(nearest_neighbours(distance, count, static_cast<size_t>(start) * count / starts));
  std::stable_sort(tours.begin(), tours.end(),
                   [&](const Tour& a, const Tour& b) { return distance.length(a) < distance.length(b); });
  for (Tour& tour : tours) {
    improve(distance, tour, budget);
    if (distance.length(tour) < distance.length(best)) best = tour;
  }
  return best;
}

}  // namespace

std::vector<int64_t> order_rows(const Paths& paths) {
  const Distinct distinct(paths);
  const Distances distance{distinct};
  const Tour tour =
      distinct.size() <= kExact ? shortest(distance, distinct.size()) : short_tour(distance, distinct.size());
  std::vector<int64_t> order;
  for (const size_t path : tour)
    if (path < distinct.size()) order.insert(order.end(), distinct.rows[path].begin(), distinct.rows[path].end());
  return order;
}

}  // namespace drllm_fast::plan
