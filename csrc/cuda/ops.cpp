// The module drllm_fast._C_cuda. Importing it registers the CUDA kernels under the schemas of drllm_fast/rows_ops.py. It is
// not part of drllm_fast._C, so that this one loads beside a torch without CUDA. torch is reached through its stable ABI
// only.
#include <Python.h>

#include "../tensors.h"
#include "rows.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <tuple>

namespace drllm_fast::cuda {
namespace {

// The device of x as the current one, and its current stream.
struct Place {
  explicit Place(const Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::Double: return Type::kDouble;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kHalf;
    default: check_type(false, "x must be float32, bfloat16, float16, float64");
  }
}

int64_t element_size(const Tensor& x) { return static_cast<int64_t>(x.element_size()); }

Rows rows_of(const Tensor& x) { return {x.const_data_ptr(), x.size(0), x.stride(0) * element_size(x)}; }

Index index_of(const Tensor& index) { return {index.const_data_ptr<int64_t>(), index.size(0)}; }

std::tuple<Tensor, Tensor, Tensor> visit(const Tensor& decisions, const Tensor& cu_seqlens, int64_t tokens) {
  check_decisions(decisions, cu_seqlens);
  check_value(tokens >= 0, "tokens must be at least cu_seqlens[-1], got ", tokens);
  const int64_t rows = decisions.size(0);
  const Place place(decisions);
  const Tensor decided = torch::stable::contiguous(decisions), offsets = torch::stable::contiguous(cu_seqlens);
  Tensor index = torch::stable::new_empty(decisions, {2, tokens}, ScalarType::Long);
  Tensor cu_visits = torch::stable::new_empty(decisions, {2, rows + 1}, ScalarType::Int);
  Tensor numbers = torch::stable::new_empty(decisions, {2, rows}, ScalarType::Int);
  visit_rows(decided.const_data_ptr<int8_t>(), offsets.const_data_ptr<int32_t>(), rows, tokens,
             index.mutable_data_ptr<int64_t>(), cu_visits.mutable_data_ptr<int32_t>(),
             numbers.mutable_data_ptr<int32_t>(), place.stream);
  return {index, cu_visits, numbers};
}

Tensor gather(const Tensor& x, const Tensor& index) {
  check_index(x, index);
  const Place place(x);
  const Tensor from = with_whole_rows(x), at = torch::stable::contiguous(index);
  Tensor out = torch::stable::new_empty(x, {index.size(0), x.size(1)});
  gather_rows(rows_of(from), index_of(at), x.size(1) * element_size(x), out.mutable_data_ptr(), place.stream);
  return out;
}

Tensor scatter(const Tensor& x, const Tensor& index, const Tensor& y) {
  check_new_rows(x, index, y);
  const Place place(x);
  const Tensor old_rows = with_whole_rows(x), new_rows = with_whole_rows(y), at = torch::stable::contiguous(index);
  Tensor source = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  scatter_rows(rows_of(old_rows), index_of(at), rows_of(new_rows), x.size(1) * element_size(x), out.mutable_data_ptr(),
               source.mutable_data_ptr<int64_t>(), place.stream);
  return out;
}

Tensor scatter_add(const Tensor& x, const Tensor& index, const Tensor& y) {
  check_new_rows(x, index, y);
  const Type type = type_of(x);
  const Place place(x);
  const Tensor old_rows = with_whole_rows(x), new_rows = with_whole_rows(y), at = torch::stable::contiguous(index);
  Tensor source = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  scatter_add_rows(type, rows_of(old_rows), index_of(at), rows_of(new_rows), x.size(1), out.mutable_data_ptr(),
                   source.mutable_data_ptr<int64_t>(), place.stream);
  return out;
}

std::tuple<Tensor, Tensor> gather_norm(const Tensor& x, const Tensor& index, const Tensor& weight, double eps) {
  check_norm(x, index, weight, eps);
  const Type type = type_of(x);
  const Place place(x);
  const Tensor from = with_whole_rows(x), at = torch::stable::contiguous(index);
  const Tensor by = torch::stable::contiguous(weight);
  Tensor gathered = torch::stable::new_empty(x, {index.size(0), x.size(1)});
  Tensor normed = torch::stable::new_empty(x, {index.size(0), x.size(1)});
  gather_rms_norm(type, rows_of(from), index_of(at), by.const_data_ptr(), x.size(1), eps, gathered.mutable_data_ptr(),
                  normed.mutable_data_ptr(), place.stream);
  return {gathered, normed};
}

}  // namespace
}  // namespace drllm_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(drllm_fast, CUDA, m) {
  m.impl("visit_rows", TORCH_BOX(&drllm_fast::cuda::visit));
  m.impl("gather_rows", TORCH_BOX(&drllm_fast::cuda::gather));
  m.impl("scatter_rows", TORCH_BOX(&drllm_fast::cuda::scatter));
  m.impl("scatter_add_rows", TORCH_BOX(&drllm_fast::cuda::scatter_add));
  m.impl("gather_rms_norm", TORCH_BOX(&drllm_fast::cuda::gather_norm));
}

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of drllm-fast.", -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "built_with_torch", TORCH_VERSION) < 0 ||
      PyModule_AddIntConstant(module, "built_with_cuda", CUDART_VERSION) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
