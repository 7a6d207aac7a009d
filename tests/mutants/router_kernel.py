"""Breakages of the fused router, each of which a test must notice: (file, text, what to put in its place, tests)."""

FILE = "drllm_fast/router_kernel.py"
TESTS = "tests/test_router_kernel.py"


def _mutant(old: str, new: str, only: str) -> tuple[str, str, str, str]:
    return FILE, old, new, f"{TESTS} -k {only}"


def _compiled(old: str, new: str) -> tuple[str, str, str, str]:
    """What only the compiled kernel shows: the interpreter runs one program at a time, in fp32 and without caches."""
    return FILE, old, new, "tests/test_triton_compile.py"


MUTANTS = [
    # A segment takes the first token of the next one, which only shows where a window has two of them.
    _mutant("mask = (done + more < length)", "mask = (done + more <= length)", "test_tokens_of_a_window"),
    _mutant("tl.minimum(size - skipped, TOKENS)", "tl.minimum(size, TOKENS)", "test_tokens_of_a_window"),
    # A tile after the first restarts its window.
    _mutant("local = segment - first_segment", "local = (segment - first_segment) % TILE", "test_segments"),
    # Segments of one window in a tile are stored as if each were a window.
    _mutant("if highest - lowest + 1 == tl.sum", "if highest - lowest + 1 <= tl.sum", "test_segments"),
    # Products instead of masks: NaN reaches the other rows.
    _mutant(
        "tl.where((window == one)[:, None], acc, 0.0)",
        "acc * (window == one)[:, None].to(tl.float32)",
        "test_rows_do_not_see_each_other",
    ),
    # Rows of the second block of cu_seqlens start from zero.
    _mutant("total += tl.sum(segments, 0)", "total = tl.sum(segments, 0)", "test_rows"),
    # Whoever arrives finishes the row, from pieces that are not all there; the last one gets it right.
    _mutant("arrived + 1 == expected", "arrived == 0", "test_which_program"),
    # The last but one finishes it.
    _mutant("arrived + 1 == expected", "arrived + 2 == expected", "test_columns"),
    # Only the tile in which a row begins announces it.
    _mutant("((local == 0) | (segment == first_of_tile))", "(local == 0)", "test_segments"),
    # Splits overlap.
    _mutant("tl.minimum((split + 1) * slices, tl.cdiv(d, BLOCK_D))", "tl.cdiv(d, BLOCK_D)", "test_columns"),
    # Only one split of each tile is summed.
    _mutant("- tile + 1) * splits, 0)", "- tile + 1) * 1, 0)", "test_columns"),
    # Hidden units of the second chunk are those of the first.
    _mutant("hidden = (program % chunks) * BLOCK_H + ", "hidden = (program % 1) * BLOCK_H + ", "test_hidden_units"),
    # The sum over windows instead of the mean.
    _mutant("logits = logits / count.to(tl.float32)", "logits = logits / 1.0", "test_tokens_of_a_window"),
    # Rows without tokens keep the bias.
    _mutant("tl.where(length > 0, logits, 0.0)", "tl.where(length >= 0, logits, 0.0)", "test_rows_without_tokens"),
    # GELU in its other approximation.
    _mutant("1.5957691216057308 * (z + 0.044715 * z * z * z)", "1.702 * z", "test_columns"),
    # A tie skips.
    _mutant("(skip > execute) & (skip > repeat)", "(skip >= execute) & (skip > repeat)", "test_ties"),
    # A NaN is overlooked.
    _mutant("(repeat > execute) & (repeat > skip)", "repeat > tl.maximum(execute, skip)", "test_ties"),
    _compiled('input_precision="tf32x3"', 'input_precision="tf32"'),
    _compiled('sem="acq_rel"', 'sem="relaxed"'),
    _compiled(', cache_modifier=".cg"', ""),
]
