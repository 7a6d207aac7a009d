// What the kernels of attention_kernel.h are given.
#pragma once

#include <cstdint>

namespace drllm_fast::cpu {

// One call of ragged_attention. Strides count elements; the last dimension of every tensor is dense.
struct Attention {
  const void *query, *keys, *values;
  void* out;           // [T, H, D_v], contiguous
  const float* sinks;  // [H] or null
  int64_t query_token, query_head, key_head, key_token, value_head, value_token;
  int64_t heads, group, dim, dim_v;  // H, H / H_kv, D, D_v
  float scale, softcap;              // softcap 0 for none
  int64_t window;                    // as long as any row for none
};

// The part of it that one thread does at a time: `tokens` queries of one row, for the heads of one group, against keys
// [first_key, last_key) of the row.
struct AttentionTask {
  int64_t token;      // of the first query in T
  int64_t position;   // of that query in its row
  int64_t tokens;     //
  int64_t start;      // of the row's keys in N
  int64_t kv_head;    //
  int64_t first_key;  //
  int64_t last_key;   //
  float* partial;     // null, or where a part of a row's keys leaves [group, D_v + 2]: weighted values, maximum, sum
};

}  // namespace drllm_fast::cpu
