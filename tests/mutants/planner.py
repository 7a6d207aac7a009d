"""Deliberate breakages of the planner: (file, old text, new text, the pytest selection that must fail)."""

MUTANTS = [
    (  # a set with gaps counts as a range
        "csrc/plan_decode.cpp",
        "rows.back() - rows.front() + 1 == count",
        "rows.back() - rows.front() + 1 >= count",
        "tests/test_planner.py -k decode",
    ),
    (  # the second pass of a layer beyond the first word of bits is lost
        "csrc/plan_decode.cpp",
        "bits[at + layer / 32] |= passes << (2 * (layer % 32));",
        "bits[at + layer / 32] |= (layer < 32 ? passes : passes & 1) << (2 * (layer % 32));",
        "tests/test_planner.py -k 'groups or order'",
    ),
    (  # no row that runs nothing at the end of the tour
        "csrc/plan_order.cpp",
        "if (done == all) best = between[last * (count + 1) + count];",
        "if (done == all) best = 0;",
        "tests/test_planner.py -k order",
    ),
    (  # 2-opt forgets one of the two steps that change
        "csrc/plan_order.cpp",
        "distance(tour[i - 1], tour[j]) + distance(tour[i], tour[j + 1])",
        "distance(tour[i - 1], tour[j]) + distance(tour[j], tour[j + 1])",
        "tests/test_planner.py -k order",
    ),
    (  # or-opt moves single paths only
        "csrc/plan_order.cpp",
        "kSegment = 3",
        "kSegment = 1",
        "tests/test_planner.py -k order",
    ),
    (  # a visit that a batch gets twice counts as run by one path only
        "csrc/plan_group.cpp",
        "batch.once[w] = (batch.once[w] & ~p[w]) | (p[w] & ~batch.any[w]);",
        "batch.once[w] |= p[w] & ~batch.any[w];",
        "tests/test_planner.py -k 'local_search or groups'",
    ),
    (  # what comes back in an exchange is held to cost nothing
        "csrc/plan_group.cpp",
        "if (change < best) change += weigh([&](size_t w) { return q[w] & ~from.any[w]; });",
        "",
        "tests/test_planner.py -k 'local_search or groups'",
    ),
    (  # an exchange may overfill the batch that gives
        "csrc/plan_group.cpp",
        "const int64_t room = max_batch_ - from.rows + moved.copies;",
        "const int64_t room = max_batch_;",
        "tests/test_planner.py -k 'local_search or groups'",
    ),
    (  # the exact solver allows a row too many
        "csrc/plan_group.cpp",
        "|| rows == max_batch_)) {",
        "|| rows > max_batch_)) {",
        "tests/test_planner.py -k groups",
    ),
    (  # all visits cost the same
        "csrc/plan_group.cpp",
        "sum += cost_[64 * w + lowest_bit(rest)];",
        "sum += cost_[0 * (64 * w + lowest_bit(rest))];",
        "tests/test_planner.py -k 'optimal or costs_decide'",
    ),
    (  # the GIL is kept
        "csrc/plan_module.cpp",
        "  const Paths paths = paths_of(array);\n  py::gil_scoped_release release;\n",
        "  const Paths paths = paths_of(array);\n",
        "tests/test_planner.py -k gil",
    ),
    (  # visits of the same rows have tuples of their own
        "drllm_fast/planner_reference.py",
        "        return known[rows]\n",
        "        return known.pop(rows)\n",
        "tests/test_planner.py -k decode",
    ),
    (  # the reference takes what adds most
        "drllm_fast/planner_reference.py",
        "batches = min(tried,",
        "batches = max(tried,",
        "tests/test_planner.py -k groups",
    ),
    (  # a cost below zero is taken
        "drllm_fast/planner.py",
        "and (cost >= 0).all()",
        "",
        "tests/test_planner.py -k grouped",
    ),
    (  # rows of a cache are kept in a slot that they never ran
        "drllm_fast/cache.py",
        "(slot, [rank[s] for s in sources if rank[s] >= 0],",
        "(slot, [rank[s] for s in sources],",
        "tests/test_generate.py -k beam",
    ),
]
