// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Optimizer states in a memory-mapped file: they are read while the parameter before is stepped,
/// and written back by the system. Bit-equal to states in memory, in the same files of states.
///
///   optim::AdamWOf<Int8> optimizer(model->parameters(), 1e-3,
///                                  {.offload = on_file({.directory = "/scratch"})});
///
///   struct ToScratch {
///     static fourfold::MappedFileOptions options() { return {.directory = "/scratch"}; }
///   };
///   using Pipeline = CompressionPipeline<
///       OptimizerStates<Int8, optim::RoundNearest, OnFile<ToScratch>>>;
///
/// Any rule and any codec, stepped by hand or in backward. In memory stand the states of the
/// parameter that is stepped, those of the next as far as they have been read, and what is smaller
/// than `min_bytes`. What does not fit on the disk stays in memory (core/mapped_file.hpp).
#include <ATen/core/Tensor.h>
#include <fourfold/core/mapped_file.hpp>

#include <utility>
#include <vector>

namespace fourfold::inline v0 {

struct DefaultMappedFile {
  static MappedFileOptions options() { return {}; }
};

/// `Where::options()` is asked once an optimizer. A directory that cannot be written to is an error
/// then.
template <class Where = DefaultMappedFile>
struct OnFile {
  template <class Optimizer>
  class Holding : public Optimizer {
   public:
    explicit Holding(std::vector<at::Tensor> parameters, typename Optimizer::Options options = {})
        : Optimizer(std::move(parameters), std::move(options),
                    {.offload = on_file(Where::options())}) {}
  };
};

/// States in the host's memory and the step on the CPU, for parameters on a GPU
/// (core/host_memory.hpp).
struct InHostMemory {
  template <class Optimizer>
  class Holding : public Optimizer {
   public:
    explicit Holding(std::vector<at::Tensor> parameters, typename Optimizer::Options options = {})
        : Optimizer(std::move(parameters), std::move(options), {.offload = on_host()}) {}
  };
};

}  // namespace fourfold::inline v0
