"""Mutants of the row ops: their kernels, their reference, their gradients."""

ROWS_CPP, ROWS_CPU_H, FUSED_CPP = "csrc/cpu/rows.cpp", "csrc/cpu/rows.h", "csrc/cpu/fused_rows.cpp"
TENSORS, ROWS_CU, OPS, REFERENCE = (
    "csrc/tensors.h",
    "csrc/cuda/rows.cu",
    "drllm_fast/rows_ops.py",
    "drllm_fast/rows_reference.py",
)

CPU = "tests/test_rows.py"
CPU_ADD, CPU_NORM, GRADIENTS = (f"{CPU} -k '{name}'" for name in ("add", "norm or eps or not_read", "gradients"))
VISIT, COPY, ADD, NORM = (
    f"tests/test_cuda_rows.py -k '{name} and not planted'"
    for name in ("test_visit_rows", "(gather_and or repeat or twice or stops)", "scatter_add", "norm")
)
RACE = "tests/test_cuda_rows.py -k no_kernel_has_a_race"

MUTANTS = [
    # active_tokens on the CPU
    (ROWS_CPP, "if (decision[row] >= at_least) f(row);", "if (decision[row] > at_least) f(row);", CPU),
    (ROWS_CPP, "*++end = before + (batch", "*++end = (batch", CPU),
    (ROWS_CPP, "active_count += batch.begin[row + 1] - batch.begin[row]", "active_count += batch.begin[row + 1]", CPU),
    (ROWS_CPP, "begin[row] <= begin[row + 1], ", "true, ", CPU),
    # visit_rows on the CPU
    (ROWS_CPP, "batch.each_active(visit + 1, ", "batch.each_active(1, ", CPU),
    (ROWS_CPP, "std::fill(end, last_end, total);", "std::fill(end, last_end, 0);", CPU),
    (ROWS_CPP, "std::fill(number, last_number, -1);", "std::fill(number, last_number, 0);", CPU),
    (ROWS_CPP, "std::fill(position, last_position, -1);", "std::fill(position, last_position, 0);", CPU),
    (ROWS_CPP, "tokens >= batch.begin[batch.rows], ", "tokens >= 0, ", CPU),
    # gather_rows and scatter_rows on the CPU
    (ROWS_CPP, "source(end) == from + (end - first) * step", "true", CPU),
    (ROWS_CPP, "at[i] < 0 ? nullptr : from[at[i]]", "from[at[i] < 0 ? 0 : at[i]]", CPU),
    (ROWS_CPP, "std::memset(to + first * bytes, 0, (end", "std::memset(to + first * bytes, 1, (end", CPU),
    (ROWS_CPP, "source[row] < 0 ? old_rows[row]", "source[row] <= 0 ? old_rows[row]", CPU),
    (ROWS_CPU_H, "check_value(first < 0, ", "check_value(true, ", CPU),
    (ROWS_CPU_H, "-1 <= at[i] && ", "-3 <= at[i] && ", CPU),
    (ROWS_CPU_H, "at[i] < x.size(0)", "at[i] <= x.size(0)", CPU),
    (ROWS_CPU_H, "if (at[i] < 0) continue;", "if (at[i] < 0) break;", CPU),
    (TENSORS, "x.size(1) <= 1 || x.stride(1) == 1", "true", CPU),
    # scatter_add_rows and gather_rms_norm on the CPU
    (FUSED_CPP, "if (source[row] < 0)", "if (source[row] <= 0)", CPU_ADD),
    (FUSED_CPP, "(new_rows[source[row]])", "(new_rows[0])", CPU_ADD),
    (FUSED_CPP, "std::memcpy(at, old_rows[row], old_rows.bytes);", "std::memset(at, 0, old_rows.bytes);", CPU_ADD),
    (FUSED_CPP, "for (; c < columns; ++c) lanes", "for (; c + 1 < columns; ++c) lanes", CPU_NORM),
    (FUSED_CPP, "half > 0; half /= 2", "half > 1; half /= 2", CPU_NORM),
    (
        FUSED_CPP,
        "const T unit = static_cast<T>(static_cast<Sum<T>>(x[c]) * by)",
        "const Sum<T> unit = x[c] * by",
        CPU_NORM,
    ),
    (FUSED_CPP, "mean + static_cast<Sum<T>>(eps)", "mean", CPU_NORM),
    (FUSED_CPP, "std::memset(unit, 0, from.bytes);", "std::memset(unit, 1, from.bytes);", CPU_NORM),
    # the reference and the gradients
    (REFERENCE, "torch.where(active, rank - 1, rows)", "torch.where(active, rank, rows)", CPU),
    (REFERENCE, "right=True", "right=False", CPU),
    (REFERENCE, "torch.where(slot <= count, cu_visits, total)", "cu_visits", CPU),
    (REFERENCE, ".contiguous().masked_fill_(none[:, None], 0)", ".contiguous()", CPU),
    (REFERENCE, "named = index[index >= 0]", "named = index[index > 0]", CPU),
    (REFERENCE, "normed.masked_fill_((index == -1)[:, None], 0)", "normed", CPU_NORM),
    (OPS, "index_add(0, spare_last(index, rows), grad)", "index_add(0, index.clamp(min=0), grad)", GRADIENTS),
    (OPS, "unit * (grad_unit * unit).mean(1, keepdim=True)", "unit * grad_unit.mean(1, keepdim=True)", GRADIENTS),
    (OPS, "return grad, None, torch.ops", "return 2 * grad, None, torch.ops", GRADIENTS),
    (OPS, "grad_gathered + grad.to(gathered.dtype)", "grad.to(gathered.dtype)", GRADIENTS),
    # visit_rows on CUDA
    (ROWS_CU, "decisions[row] > visit;", "decisions[row] >= visit;", VISIT),
    (ROWS_CU, "row < rows && decisions[row]", "decisions[row]", VISIT),
    (ROWS_CU, "if (lane >= step) x += below;", "if (lane > step) x += below;", VISIT),
    (ROWS_CU, "rank += count + chunk_count;", "rank += chunk_count;", VISIT),
    (ROWS_CU, "end += total + chunk_total;", "end += total;", VISIT),
    (ROWS_CU, "cu_visits[slot + 1] = total;", "cu_visits[slot + 1] = 0;", VISIT),
    (ROWS_CU, "    __syncthreads();\n    int chunk_count", "    int chunk_count", RACE),
    (ROWS_CU, "    __syncthreads();  // the next rows", "    // the next rows", RACE),
    (ROWS_CU, "if (j >= total)", "if (j > total)", VISIT),
    (ROWS_CU, "cu_visits[middle] <= j", "cu_visits[middle] < j", VISIT),
    (ROWS_CU, "j < tokens; j += int64_t{gridDim.x} * kThreads", "j < tokens; j += tokens", VISIT),
    # gather_rows and scatter_rows on CUDA
    (ROWS_CU, "if (at < -1 || at >= rows)", "if (at < -2 || at >= rows)", COPY),
    (ROWS_CU, "if (at < -1 || at >= rows)", "if (at < -1 || at > rows)", COPY),
    (ROWS_CU, "if (row >= 0) atomicMax", "if (row > 0) atomicMax", COPY),
    (
        ROWS_CU,
        "atomicMax(reinterpret_cast<long long*>(source + row), static_cast<long long>(i))",
        "source[row] = i",
        RACE,
    ),
    (ROWS_CU, "i < index.count; i += int64_t{gridDim.x} * kThreads", "i < index.count; i += index.count", COPY),
    (ROWS_CU, "cudaMemsetAsync(source, 0xff", "cudaMemsetAsync(source, 0x00", COPY),
    (ROWS_CU, "return at < 0 ? nullptr : row_of<T>(x, at);", "return row_of<T>(x, at < 0 ? 0 : at);", COPY),
    (ROWS_CU, "source[i] < 0 ? row_of<T>(x, i)", "source[i] <= 0 ? row_of<T>(x, i)", COPY),
    (ROWS_CU, "i < rows; i += int64_t{gridDim.x} * blockDim.y", "i < rows; i += rows", COPY),
    (ROWS_CU, "c < width; c += blockDim.x) out", "c < width; c += width) out", COPY),
    (ROWS_CU, "for (int64_t distance : distances) all |= distance;", "", COPY),
    (
        ROWS_CU,
        "all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));",
        "all |= 0 * (pointer != nullptr);",
        COPY,
    ),
    (ROWS_CU, "access({x.data, out}, {x.stride, bytes})", "access({x.data, out}, {x.stride})", COPY),
    (ROWS_CU, "{x.stride, y.stride, bytes}", "{x.stride, y.stride}", COPY),
    # scatter_add_rows on CUDA
    (ROWS_CU, "source[i] < 0 ? nullptr : row_of<P>(y", "source[i] <= 0 ? nullptr : row_of<P>(y", ADD),
    (ROWS_CU, "{x.stride, y.stride, columns * size_of(type)}", "{x.stride, y.stride}", ADD),
    (ROWS_CU, "i < x.count; i += int64_t{gridDim.x} * blockDim.y", "i < x.count; i += x.count", ADD),
    (ROWS_CU, "++k) sum.value[k] = narrow", "k += 2) sum.value[k] = narrow", ADD),
    # gather_rms_norm on CUDA
    (ROWS_CU, "{x.stride, columns * size_of(type)}", "{x.stride}", NORM),
    (ROWS_CU, "step > 0; step /= 2", "step > 1; step /= 2", NORM),
    (ROWS_CU, "warp < static_cast<int>(blockDim.x) / kWarp", "warp < 1", NORM),
    (ROWS_CU, "copy[c] = unit[c] = P{};", "copy[c] = P{};", NORM),
    (ROWS_CU, "static_cast<Sum<T>>(width * kSize<P>)", "static_cast<Sum<T>>(width)", NORM),
    (ROWS_CU, "mean + static_cast<Sum<T>>(eps)", "mean", NORM),
    (
        ROWS_CU,
        "const T rounded = narrow<T>(widen(pack.value[k]) * scale)",
        "const Sum<T> rounded = widen(pack.value[k]) * scale",
        NORM,
    ),
    (ROWS_CU, "i < index.count; i += gridDim.x", "i < index.count; i += index.count", NORM),
    (ROWS_CU, "  __syncthreads();\n  x = 0;", "  x = 0;", RACE),
    (ROWS_CU, "  __syncthreads();  // the next row ", "  // the next row ", RACE),
]
