#pragma once

namespace drllm_fast::cpu {

enum class Isa { baseline, avx2, avx512, avx512bf16 };
Isa isa();  // the best that this processor has, or the lesser one that DRLLM_FAST_ISA names; fixed at its first use
const char* name(Isa level);

}  // namespace drllm_fast::cpu
