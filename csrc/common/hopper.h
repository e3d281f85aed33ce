// SPDX-License-Identifier: Apache-2.0
// The instructions of sm_90a that CUDA C++ has no name for: barriers in shared memory, asynchronous
// copies, clusters. Addresses in shared memory are 32 bits wide, as the instructions take them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vlmk {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSharedLimit = 227 << 10;  // bytes of shared memory that a block can have

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all blocks of the cluster, and what they wrote before.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The same in two halves, but of what was written before, only barriers behind fence_barrier_init
// are seen: to see the rest takes a fence that waits for all stores.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Until the grids that this one was launched behind are done and what they wrote can be read; where
// the launch didn't ask for an early start, they are.
__device__ __forceinline__ void wait_for_previous_grids() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next grid may start, and wait in its turn.
__device__ __forceinline__ void let_next_grid_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// What this thread stored to shared memory becomes visible to the tensor cores and to bulk copies.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the other blocks and to copies.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// An arrival, and so many bytes to come before the phase is over.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// An arrival at a barrier of any block of the cluster.
__device__ __forceinline__ void barrier_arrive_in_block(uint32_t remote_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A barrier in hardware, of `kCount` threads in whole warps; 0 is that of __syncthreads.
template <int kCount>
__device__ __forceinline__ void named_wait(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kCount) : "memory");
}
template <int kCount>
__device__ __forceinline__ void named_arrive(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kCount) : "memory");
}

// The same, and whether it holds for any of the threads.
template <int kCount>
__device__ __forceinline__ bool named_any(int barrier, bool holds) {
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.b32 mine, %1, 0;\n"
      "bar.red.or.pred any, %2, %3, mine;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}"
      : "=r"(any)
      : "r"(static_cast<int>(holds)), "r"(barrier), "n"(kCount)
      : "memory");
  return any != 0;
}

// Reads of shared memory in the order of the program, between barriers.
__device__ __forceinline__ void load_shared(uint32_t address, uint32_t& x) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t address, uint2& x) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t address, uint4& x) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}

// Where `wanted`, without a branch: behind one that only some lanes of a warp take, ptxas may bring
// the descriptors of every product of a loop by way of registers (attention's backward of head dim
// 96: 96 R2UR and 880 instructions for a tile of queries instead of none and 697).
__device__ __forceinline__ void store_shared_if(bool wanted, uint32_t address, int32_t x) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %0, 0;\n"
      "@p st.shared.s32 [%1], %2;}" ::"r"(static_cast<int>(wanted)),
      "r"(address), "r"(x)
      : "memory");
}

// To another block's shared memory, counted at a barrier there.
__device__ __forceinline__ void store_to_block(uint32_t destination, float2 x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          destination),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_to_block(uint32_t destination, int32_t x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(
                   destination),
               "r"(x), "r"(barrier)
               : "memory");
}

// From another block's shared memory.
__device__ __forceinline__ float4 load_from_block(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// 16 bytes from global memory that nobody writes meanwhile, or zeros.
__device__ __forceinline__ uint4 load_global(const void* source, bool there) {
  uint4 x;
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.b32 there, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@there ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(source), "r"(static_cast<int>(there)));
  return x;
}

// 16 bytes at once: nvcc may take a vector apart before it is stored.
__device__ __forceinline__ void store_global(void* destination, const uint4& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// Added to what lies in global memory, by all of the GPU.
__device__ __forceinline__ void add_to_global(float4* place, float4 x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(place), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// The same of consecutive numbers in shared memory, by the copy engine.
__device__ __forceinline__ void add_to_global(void* place, uint32_t source, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(place),
      "r"(source), "r"(bytes)
      : "memory");
}

// 8 bytes from global memory that nobody writes meanwhile, or zeros.
__device__ __forceinline__ uint2 load_global_8(const void* source, bool there) {
  uint2 x;
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.b32 there, %3, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@there ld.global.nc.v2.u32 {%0, %1}, [%2];\n"
      "}"
      : "=r"(x.x), "=r"(x.y)
      : "l"(source), "r"(static_cast<int>(there)));
  return x;
}

// The line of 128 bytes there comes to L2.
__device__ __forceinline__ void prefetch_global(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// 16 bytes from global memory, past L1.
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source)
               : "memory");
}

// 8 bytes from global memory, or zeros.
__device__ __forceinline__ void copy_async_8(uint32_t destination, const void* source, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(destination), "l"(source),
               "r"(there ? 8 : 0)
               : "memory");
}

// What this thread copied since the last time is a group.
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the last kPending groups are there, for this thread.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives once all that this thread copied before is there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// A bulk copy from global memory, in multiples of 16 bytes, which are counted at a barrier.
__device__ __forceinline__ void copy_from_global(uint32_t destination, const void* source,
                                                 uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// A bulk copy from this block's shared memory to another's, in multiples of 16 bytes, which are
// counted at a barrier there.
__device__ __forceinline__ void copy_to_block(uint32_t destination, uint32_t source, uint32_t bytes,
                                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(destination),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// Until all bulk stores that this thread has committed, or all but the last, have read shared
// memory.
template <int kPending = 0>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all of them are in memory, for this thread.
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// With it comes what others had written before they set or added what this finds.
__device__ __forceinline__ int load_acquire(const int* place) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(place) : "memory");
  return x;
}

// Matrices of 8 x 8 16-bit floats, dealt out like sums of wgmma, to rows of 16 bytes: lane i names
// row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&x)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(x[0]),
               "r"(x[1])
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void store_transposed(uint32_t row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// A place that ptxas moves nothing across: a loop that ends at once. `never` is false, but not in a
// way that the compiler could know.
__device__ __forceinline__ void stay_behind(bool never) {
  asm volatile(
      "{\n"
      ".reg .pred never;\n"
      "again:\n"
      "setp.ne.b32 never, %0, 0;\n"
      "@never nanosleep.u32 1;\n"
      "@never bra again;\n"
      "}" ::"r"(static_cast<int>(never))
      : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace vlmk
