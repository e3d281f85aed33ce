// SPDX-License-Identifier: Apache-2.0
// The text of the last error of each thread, the version of the interface, and what the driver can
// run.
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

int vlmk_check_driver(void) {
  int driver = 0;
  VLMK_CUDA(cudaDriverGetVersion(&driver));
  if (driver == 0) return vlmk::fail(cudaErrorNoDevice, "there is no GPU driver");
  // Drivers run what was built with any minor version of their own major version, and older ones.
  if (driver / 1000 >= CUDART_VERSION / 1000) return 0;
  return vlmk::fail(cudaErrorInsufficientDriver,
                    "the GPU driver is for CUDA %d.%d, the library was built with %d.%d",
                    driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                    CUDART_VERSION % 1000 / 10);
}
