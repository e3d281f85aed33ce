// SPDX-License-Identifier: Apache-2.0
// Division on the device.
#pragma once

#include <cstdint>

namespace vlmk {

// Division by a number that the host knows, for 0 <= n < 2^31: a tenth of a division's cycles.
struct Divisor {
  int32_t divisor;
  uint32_t multiplier;
  int32_t shift;

  explicit Divisor(int d) : divisor(d), multiplier(0), shift(0) {
    if (d <= 1) return;
    int bits = 0;
    while ((int64_t{1} << bits) < d) ++bits;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + d - 1) / d);
    shift = bits - 1;
  }

  __device__ __forceinline__ int divide(int n) const {
    return divisor == 1 ? n : static_cast<int>(__umulhi(n, multiplier) >> shift);
  }
};

}  // namespace vlmk
