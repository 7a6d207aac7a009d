"""Deliberate mistakes in the attention kernels and in the choice of varlen_attn: (file, text, its replacement, tests of
which one must fail). Each text occurs once in its file."""

KERNEL, VARLEN = "drllm_fast/attention_kernel.py", "drllm_fast/varlen.py"
TESTS = "tests/test_attention_kernel.py"

MUTANTS = [
    # A window of one more.
    (
        KERNEL,
        "[None, :] > position[:, None] - window",
        "[None, :] >= position[:, None] - window",
        f"{TESTS} -k one_row",
    ),
    # The block in which the last query's window begins is not masked.
    (
        KERNEL,
        "tl.cdiv(last_position - window + 1, BLOCK_N) * BLOCK_N",
        "(last_position - window + 1) // BLOCK_N * BLOCK_N",
        f"{TESTS} -k rows_of_every_size",
    ),
    # The block of the diagonal is not masked.
    (
        KERNEL,
        "(first_position + 1) // BLOCK_N * BLOCK_N",
        "tl.cdiv(first_position + 1, BLOCK_N) * BLOCK_N",
        f"{TESTS} -k rows_of_every_size",
    ),
    # The keys of a row end a block late.
    (KERNEL, "inside = (block + at < end)", "inside = (block + at < end + BLOCK_N)", f"{TESTS} -k one_row"),
    # Sums are not rescaled when a larger score turns up.
    (KERNEL, "values, acc * faded[:, None],", "values, acc,", f"{TESTS} -k rows_of_every_size"),
    # A query that has seen no key yet.
    (KERNEL, 'tl.where(top == float("-inf"), 0, top)', "top", f"{TESTS} -k rows_of_every_size"),
    # The first program of a row takes itself for the last of the row before.
    (KERNEL, "candidates <= program)", "candidates < program)", f"{TESTS} -k search"),
    # Rows beyond the first block of the search.
    (
        KERNEL,
        "for block in range(0, rows, BLOCK_ROWS)",
        "for block in range(0, tl.minimum(rows, BLOCK_ROWS), BLOCK_ROWS)",
        f"{TESTS} -k search",
    ),
    # Rows that are not there count.
    (KERNEL, " & (candidates < rows)", "", f"{TESTS} -k search"),
    # Totals that nobody wrote.
    (
        KERNEL,
        "tl.load(totals_ptr + split, mask=found, other=0)",
        "tl.load(totals_ptr + split, mask=block + at < splits, other=0)",
        f"{TESTS} -k split_keys",
    ),
    # A split fewer.
    (KERNEL, "+ length - 2) // length + 1)", "+ length - 2) // length)", f"{TESTS} -k split"),
    # Splits overlap.
    (
        KERNEL,
        "(oldest // SPLIT + split + 1) * SPLIT",
        "(oldest // SPLIT + split + 2) * SPLIT",
        f"{TESTS} -k split_keys",
    ),
    # Sinks are left out where keys are split, or where they are not.
    (KERNEL, "        total += tl.exp2(sink - most)\n", "        total += 0.0\n", f"{TESTS} -k split_keys"),
    (KERNEL, "tl.exp2(top - most) + tl.exp2(sink - most)", "tl.exp2(top - most)", f"{TESTS} -k every_size"),
    # The interpreter does not round to tf32; what is compiled does.
    (
        KERNEL,
        'tl.trans(keys), input_precision="ieee"',
        'tl.trans(keys), input_precision="tf32"',
        "tests/test_attention_compile.py -k tf32",
    ),
    # varlen_attn's window does not count the query itself.
    (VARLEN, "else window - 1, 0)", "else window, 0)", "tests/test_varlen.py"),
    (VARLEN, " or query.shape[1] == keys.shape[0]", " or True", "tests/test_varlen.py"),
    (VARLEN, "and not windowed", "", "tests/test_varlen.py"),
]
