// SPDX-License-Identifier: Apache-2.0
// Launches that return their own error and leave none behind.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <utility>

#include "common/error.h"

namespace vlmk {

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

constexpr int kMaxDevices = 64;

// The calling thread's GPU, as an index into what is remembered for each.
inline int current_device(int& device) {
  VLMK_CUDA(cudaGetDevice(&device));
  VLMK_CHECK(device < kMaxDevices, "GPU %d: at most %d are supported", device, kMaxDevices);
  return 0;
}

// The current GPU's multiprocessors, after the kernel's share of shared memory is raised.
template <auto kKernel, int kSharedBytes>
int multiprocessors(int& count) {
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  const int code = current_device(device);
  if (code) return code;
  count = known[device].load(std::memory_order_relaxed);
  if (count > 0) return 0;
  VLMK_CUDA(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  VLMK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  known[device].store(count, std::memory_order_relaxed);
  return 0;
}

// How a kernel is launched, in clusters of so many blocks. It points into itself. Blocks that start
// early do so while the grids before in the stream are not done yet: such a kernel has to call
// wait_for_previous_grids() before it touches memory.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void* stream,
               bool early = false) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {cluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = early;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = early ? 2 : 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// A failing cudaLaunchKernelEx also sets the runtime's last error, which the next call would find:
// it is taken away here.
template <typename... Params, typename... Args>
int launch(const char* name, void (*kernel)(Params...), const LaunchConfig& launch,
           Args&&... args) {
  const cudaLaunchConfig_t& config = launch.config;
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (code == cudaSuccess) return 0;
  cudaGetLastError();
  const dim3 grid = config.gridDim, block = config.blockDim;
  return fail(code, "%s<<<(%u, %u, %u), (%u, %u, %u), %zu bytes>>>: %s", name, grid.x, grid.y,
              grid.z, block.x, block.y, block.z, config.dynamicSmemBytes, cudaGetErrorString(code));
}

// How many clusters of so many blocks, up to 16, find room on the current GPU at once; 0 where the
// kernel can't run. Raises its share of shared memory, too.
template <auto kKernel, int kThreads, int kSharedBytes>
int active_clusters(unsigned cluster, int& count) {
  static std::atomic<int> known[kMaxDevices][17];  // one more than there are, as 0 is not yet known
  int device = 0;
  const int code = current_device(device);
  if (code) return code;
  count = known[device][cluster].load(std::memory_order_relaxed) - 1;
  if (count >= 0) return 0;
  VLMK_CUDA(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  VLMK_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  const LaunchConfig launch(dim3(cluster), dim3(kThreads), cluster, kSharedBytes, nullptr);
  VLMK_CUDA(cudaOccupancyMaxActiveClusters(&count, kKernel, &launch.config));
  known[device][cluster].store(count + 1, std::memory_order_relaxed);
  return 0;
}

template <typename... Params, typename... Args>
int launch_clusters(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                    unsigned cluster, size_t shared_bytes, void* stream, Args&&... args) {
  return launch(name, kernel, LaunchConfig(grid, block, cluster, shared_bytes, stream),
                std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
int launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
           void* stream, Args&&... args) {
  return launch_clusters(name, kernel, grid, block, 1, shared_bytes, stream,
                         std::forward<Args>(args)...);
}

}  // namespace vlmk
