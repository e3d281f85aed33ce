/* SPDX-License-Identifier: Apache-2.0 */
/* The whole C interface of libvlmkernels: plain C, no torch, no Python.
 *
 * Every entry point takes device pointers of one GPU, which must be the calling thread's current
 * device, and a stream of that GPU (a cudaStream_t). It launches asynchronously, never
 * synchronises, allocates nothing and can be captured in a CUDA graph. It returns 0, or a
 * cudaError_t whose text vlmk_last_error() gives. Strides count elements, not bytes.
 *
 * A change of any struct or signature raises VLMK_ABI_VERSION, here and in
 * vlmkernels/backends/cuda/_library.py. */
#ifndef VLMKERNELS_H_
#define VLMKERNELS_H_

#include <stdint.h>

#define VLMK_ABI_VERSION 2
#define VLMK_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* The VLMK_ABI_VERSION that the library was built with. */
VLMK_API int vlmk_abi_version(void);

/* What went wrong in the last call of this thread that returned other than 0; valid until its next
 * failing call. */
VLMK_API const char* vlmk_last_error(void);

/* 0 where the GPU driver can run this library, else an error: none there, or one for an older CUDA
 * than the library was built with. Touches no GPU. */
VLMK_API int vlmk_check_driver(void);

/* Queries and keys per tile of vlmk_tile_bounds. */
#define VLMK_TILE 64

/* Query i of batch b sees the keys max(start, 0) <= j < min(stop, num_keys); the range may be
 * empty. M = ceil(num_queries / 64) query tiles, N = ceil(num_keys / 64) key tiles. */
typedef struct {
  const int32_t* start; /* [batch, num_queries], any strides */
  const int32_t* stop;  /* [batch, num_queries], any strides */
  /* [batch, M, 4], 16-byte aligned: lo, hi, full_lo, full_hi. [lo, hi) is the hull of the non-empty
   * ranges of the tile's rows (num_keys, 0 if all are empty), [full_lo, full_hi) what every row
   * sees (num_keys, 0 if nothing). */
  int32_t* q_bounds;
  /* [batch, N, 4], 16-byte aligned: first, last, full_first, full_last. [first, last) spans the
   * query tiles whose hull meets the key tile (M, 0 if none); [full_first, full_last) is the
   * longest run of query tiles all of whose rows see the whole key tile, the first such run on ties
   * (M, 0 if none). */
  int32_t* k_bounds;
  int64_t start_stride_b;
  int64_t start_stride_q;
  int64_t stop_stride_b;
  int64_t stop_stride_q;
  int32_t batch;
  int32_t num_queries; /* at most 2^31 - 65 */
  int32_t num_keys;    /* at most 2^31 - 65 */
} VlmkTileBoundsParams;

VLMK_API int vlmk_tile_bounds(const VlmkTileBoundsParams* params, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* VLMKERNELS_H_ */
