// Python sees std::invalid_argument as ValueError, and every other exception as RuntimeError.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <stdexcept>

namespace drllm_fast::cpu {

template <class... Parts>
void check_value(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void check_type(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

}  // namespace drllm_fast::cpu
