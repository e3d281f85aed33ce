// SPDX-License-Identifier: Apache-2.0
// Errors as codes: the checks of every entry point, and the text that vlmk_last_error() returns.
#pragma once

#include <cuda_runtime_api.h>

namespace vlmk {

// Keeps the text for vlmk_last_error() and returns the code.
__attribute__((format(printf, 2, 3))) int fail(cudaError_t code, const char* format, ...);

}  // namespace vlmk

// In a function that returns an error code: leaves with one if the CUDA call fails.
#define VLMK_CUDA(call)                                                               \
  do {                                                                                \
    const cudaError_t vlmk_code = (call);                                             \
    if (vlmk_code != cudaSuccess)                                                     \
      return ::vlmk::fail(vlmk_code, "%s: %s", #call, cudaGetErrorString(vlmk_code)); \
  } while (0)

// In a function that returns an error code: leaves with one if the arguments are not what the
// header asks for.
#define VLMK_CHECK(condition, ...)                                             \
  do {                                                                         \
    if (!(condition)) return ::vlmk::fail(cudaErrorInvalidValue, __VA_ARGS__); \
  } while (0)
