// SPDX-License-Identifier: Apache-2.0
// The text of the last error of each thread, and the version of the interface.
#include <cstdarg>
#include <cstdio>

#include "common/error.h"
#include "vlmkernels.h"

namespace vlmk {

static thread_local char last_error[512] = "";

int fail(cudaError_t code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return static_cast<int>(code);
}

}  // namespace vlmk

int vlmk_abi_version(void) { return VLMK_ABI_VERSION; }

const char* vlmk_last_error(void) { return vlmk::last_error; }
