// SPDX-License-Identifier: Apache-2.0
// Pairs of 16-bit floats in words, as products and stores take them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace vlmk {

__device__ __forceinline__ uint32_t to_bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ uint32_t to_bits(__nv_bfloat162 x) {
  return *reinterpret_cast<uint32_t*>(&x);
}

// Both rounded to T, x in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    return to_bits(__floats2half2_rn(x, y));
  } else {
    return to_bits(__floats2bfloat162_rn(x, y));
  }
}

// Of bfloat16 they are the upper halves: two instructions, where CUDA's own function takes three.
template <typename T>
__device__ __forceinline__ float2 to_floats(uint32_t x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<__half2*>(&x));
  } else {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
  }
}

}  // namespace vlmk
