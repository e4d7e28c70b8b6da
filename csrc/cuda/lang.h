// SPDX-License-Identifier: Apache-2.0
// The CUDA language as ksae's kernels use it, so that one .cu file compiles twice: with nvcc for a
// GPU, and with a host compiler and KSAE_EMULATE for the tests, where another header on the include
// path defines the language on fibers.
//
//   KSAE_LAUNCH((kernel<float, 4>), grid, block, shared_bytes, stream, arguments...);
//       launches; parentheses protect the commas of template arguments.
//   KSAE_SHARED_BYTES(name);
//       declares unsigned char* name, the block's dynamic shared memory, 16-byte aligned. All
//       shared memory is taken from it: a __shared__ variable would be one for all blocks on the
//       host.
#pragma once

#ifdef KSAE_EMULATE

#include "cuda_emulation.h"

#define KSAE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                 \
  ::ksae::emulation::launch(#kernel, kernel, dim3(grid), dim3(block), shared_bytes, \
                            stream __VA_OPT__(, ) __VA_ARGS__)
#define KSAE_SHARED_BYTES(name) unsigned char* const name = ::ksae::emulation::shared_bytes()

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KSAE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define KSAE_SHARED_BYTES(name)                                      \
  extern __shared__ __align__(16) unsigned char ksae_shared_arena[]; \
  unsigned char* const name = ksae_shared_arena

#endif
