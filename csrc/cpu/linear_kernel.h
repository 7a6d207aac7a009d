// The kernels of linear.cpp. Included once for each instruction set, without include guard.
//
// out[m][n] = sum over k of x[m][k] w[n][k], one fp32 accumulator an element, k ascending: a row's result is the same
// bit for bit, however many rows there are, and whichever thread has it.
//
// Weights lie in panels of kColumns outputs: panel[k][column]. Depth goes in steps of kDepth, so that a panel's part
// (16 KiB) stays in the first cache while all blocks of rows use it.

constexpr int kColumns = 2 * kLanes;
constexpr int kBlock = kLanes == 16 ? 12 : 6;  // rows: 24 accumulators of 32 registers, 12 of 16
constexpr int kDepth = 4096 / kColumns;
constexpr int kChunk = 96;  // rows of a task, a multiple of kBlock

template <class T>
DRLLM_INLINE void store_one(T* to, Floats v, int64_t count) {
  if (count == kLanes) return store(to, v);
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// acc[row][column] += x[row][k] panel[k][column] over `depth` steps.
template <int rows, class W>
DRLLM_INLINE void multiply(float* acc, const float* x, int64_t stride, const W* panel, int64_t depth) {
  Floats c[rows][2];
  for (int i = 0; i < rows; ++i) c[i][0] = load(acc + i * kColumns), c[i][1] = load(acc + i * kColumns + kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    const Floats left = load(panel + k * kColumns), right = load(panel + k * kColumns + kLanes);
    for (int i = 0; i < rows; ++i) {
      const float value = x[i * stride + k];
      c[i][0] = c[i][0] + value * left;
      c[i][1] = c[i][1] + value * right;
    }
  }
  for (int i = 0; i < rows; ++i) store(acc + i * kColumns, c[i][0]), store(acc + i * kColumns + kLanes, c[i][1]);
}

template <int rows, class W>
DRLLM_INLINE void multiply_rows(int64_t count, float* acc, const float* x, int64_t stride, const W* panel,
                                int64_t depth) {
  if (count == rows) return multiply<rows>(acc, x, stride, panel, depth);
  if constexpr (rows > 1) multiply_rows<rows - 1>(count, acc, x, stride, panel, depth);
}

DRLLM_INLINE const float* as_floats(const float* panel, float*, int64_t) { return panel; }
DRLLM_INLINE const float* as_floats(const BFloat16* panel, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) store(to + i, load(panel + i));
  return to;
}

// Rows of x as floats, end to end.
template <class T>
DRLLM_INLINE void widen_rows(float* to, const T* x, int64_t stride, int64_t rows, int64_t depth) {
  for (int64_t row = 0; row < rows; ++row, to += depth) {
    const T* from = x + row * stride;
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) store(to + k, load(from + k));
    for (; k < depth; ++k) to[k] = widen(from[k]);
  }
}

// Columns of panels `first` to `last` for rows `row` to `row + rows`, whose inputs are x. acc [kChunk][kColumns],
// widened [kDepth][kColumns].
template <class T>
DRLLM_INLINE void linear_task(const Linear& l, const float* x, int64_t stride, int64_t row, int64_t rows, int64_t first,
                              int64_t last, float* acc, float* widened) {
  for (int64_t p = first; p < last; ++p) {
    const T* panel = static_cast<const T*>(l.panels) + p * l.depth * kColumns;
    for (int64_t i = 0; i < rows * kColumns; i += kLanes) store(acc + i, Floats{});
    for (int64_t k = 0; k < l.depth; k += kDepth) {
      const int64_t steps = l.depth - k < kDepth ? l.depth - k : kDepth;
      const T* part = panel + k * kColumns;
      if (rows <= kBlock) {
        multiply_rows<kBlock>(rows, acc, x + k, stride, part, steps);
        continue;
      }
      const float* floats = as_floats(part, widened, steps * kColumns);
      for (int64_t r = 0; r < rows; r += kBlock) {
        const int64_t count = rows - r < kBlock ? rows - r : kBlock;
        multiply_rows<kBlock>(count, acc + r * kColumns, x + r * stride + k, stride, floats, steps);
      }
    }
    const int64_t column = p * kColumns, columns = l.features - column < kColumns ? l.features - column : kColumns;
    Floats bias[2] = {Floats{}, Floats{}};
    for (int64_t i = 0; l.bias && i < columns; ++i) bias[i / kLanes][i % kLanes] = l.bias[column + i];
    for (int64_t r = 0; r < rows; ++r) {
      T* out = static_cast<T*>(l.out) + (row + r) * l.features + column;
      for (int64_t i = 0; i < columns; i += kLanes) {
        Floats v = load(acc + r * kColumns + i);
        if (l.bias) v = v + bias[i / kLanes];
        store_one(out + i, v, columns - i < kLanes ? columns - i : kLanes);
      }
    }
  }
}

template <class T>
DRLLM_INLINE void pack_panel(T* to, const T* weight, int64_t stride, int64_t features, int64_t depth, int64_t p) {
  for (int64_t i = 0; i < kColumns; ++i) {
    const int64_t feature = p * kColumns + i;
    for (int64_t k = 0; k < depth; ++k) to[k * kColumns + i] = feature < features ? weight[feature * stride + k] : T{};
  }
}

int64_t columns_of_panel() { return kColumns; }
int64_t rows_of_chunk() { return kChunk; }

// Scratch of a thread, in floats: acc and widened, and the rows of a chunk where they are not floats already.
int64_t linear_scratch_size(int64_t widened_depth) { return (kChunk + kDepth) * kColumns + kChunk * widened_depth; }

#define DRLLM_LINEAR(T, name)                                                                                          \
  void widen_rows_##name(const Linear& l, int64_t row, int64_t rows, float* scratch) {                                 \
    widen_rows(scratch + (kChunk + kDepth) * kColumns, static_cast<const T*>(l.x) + row * l.x_row, l.x_row, rows,      \
               l.depth);                                                                                               \
  }                                                                                                                    \
  void linear_##name(const Linear& l, int64_t row, int64_t rows, int64_t first, int64_t last, float* scratch) {        \
    float* widened = scratch + kChunk * kColumns;                                                                      \
    const float* x = l.widens ? widened + kDepth * kColumns : static_cast<const float*>(l.x) + row * l.x_row;          \
    linear_task<T>(l, x, l.widens ? l.depth : l.x_row, row, rows, first, last, scratch, widened);                      \
  }                                                                                                                    \
  void pack_panel_##name(void* to, const void* weight, int64_t stride, int64_t features, int64_t depth, int64_t p) {   \
    pack_panel(static_cast<T*>(to) + p * depth * kColumns, static_cast<const T*>(weight), stride, features, depth, p); \
  }
DRLLM_LINEAR(float, float)
DRLLM_LINEAR(BFloat16, bfloat16)
#undef DRLLM_LINEAR
