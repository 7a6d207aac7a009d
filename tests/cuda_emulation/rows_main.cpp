// Runs the launchers of csrc/cuda/rows.cu on the cases of a file and writes their outputs to another.
//
// A case is int64 numbers, then memory: op, parameters[8], the count of inputs and of outputs; for each of them its
// bytes and by how many it is shifted off 16; for each input its contents. All memory has exactly its size, so that a
// sanitizer sees an access behind its end.
#include "rows.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

using namespace drllm_fast::cuda;

namespace {

class Memory {
 public:
  Memory(int64_t bytes, int64_t shift) : bytes(bytes), shift_(shift), all_(new char[shift + bytes]) {
    std::memset(all_.get(), 0xa5, shift + bytes);
  }
  template <class T = char>
  T* at() const {
    return reinterpret_cast<T*>(all_.get() + shift_);
  }
  int64_t bytes;

 private:
  int64_t shift_;
  std::unique_ptr<char[]> all_;
};

std::vector<int64_t> numbers(std::ifstream& file, int64_t count) {
  std::vector<int64_t> read(count);
  file.read(reinterpret_cast<char*>(read.data()), count * sizeof(int64_t));
  return read;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ifstream cases(argv[1], std::ios::binary);
  std::ofstream results(argv[2], std::ios::binary);
  while (cases.peek() != EOF) {
    const std::vector<int64_t> head = numbers(cases, 11);
    const int64_t* const p = head.data() + 1;
    std::vector<Memory> in, out;
    for (int64_t i = 0; i < head[9] + head[10]; ++i) {
      const std::vector<int64_t> size = numbers(cases, 2);
      (i < head[9] ? in : out).emplace_back(size[0], size[1]);
    }
    for (const Memory& memory : in) cases.read(memory.at(), memory.bytes);

    const auto rows = [&](int i, int64_t count, int64_t stride) { return Rows{in[i].at(), count, stride}; };
    const auto index = [&](int i) { return Index{in[i].at<int64_t>(), in[i].bytes / int64_t{sizeof(int64_t)}}; };
    double eps;
    std::memcpy(&eps, &p[6], sizeof(eps));
    const Memory source(p[1] * sizeof(int64_t), 0);
    switch (head[0]) {
      case 0:  // rows, tokens
        visit_rows(in[0].at<int8_t>(), in[1].at<int32_t>(), p[0], p[1], out[0].at<int64_t>(), out[1].at<int32_t>(),
                   out[2].at<int32_t>(), nullptr);
        break;
      case 1:  // -, rows of x, stride of x, -, bytes
        gather_rows(rows(0, p[1], p[2]), index(1), p[4], out[0].at(), nullptr);
        break;
      case 2:  // -, rows of x, stride of x, stride of y, bytes
        scatter_rows(rows(0, p[1], p[2]), index(1), rows(2, index(1).count, p[3]), p[4], out[0].at(),
                     source.at<int64_t>(), nullptr);
        break;
      case 3:  // type, rows of x, stride of x, stride of y, -, columns
        scatter_add_rows(static_cast<Type>(p[0]), rows(0, p[1], p[2]), index(1), rows(2, index(1).count, p[3]), p[5],
                         out[0].at(), source.at<int64_t>(), nullptr);
        break;
      case 4:  // type, rows of x, stride of x, -, -, columns, eps
        gather_rms_norm(static_cast<Type>(p[0]), rows(0, p[1], p[2]), index(1), in[2].at(), p[5], eps, out[0].at(),
                        out[1].at(), nullptr);
        break;
      default:
        return 3;
    }
    for (const Memory& memory : out) results.write(memory.at(), memory.bytes);
  }
}
