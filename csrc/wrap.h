// How kernels become functions of Python.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace moe_kernels {

// Python passes an integer where the kernel takes a pointer, and the number itself elsewhere.
template <typename T>
using Argument = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <typename T>
T unwrap(Argument<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <typename... T>
auto wrap(void (*kernel)(T...)) {
  return [kernel](Argument<T>... arguments) { kernel(unwrap<T>(arguments)...); };
}

template <typename... T>
auto wrap(Index (*kernel)(T...)) {
  return [kernel](Argument<T>... arguments) { return kernel(unwrap<T>(arguments)...); };
}

}  // namespace moe_kernels
