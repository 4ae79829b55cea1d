// The kernels that were built, by what they are for.
#pragma once
#include <string_view>

#include "known_teams.h"

namespace fused_rnn::cuda {

using ForwardKernel = void (*)(ForwardLoop);
using BackwardKernel = void (*)(BackwardLoop);

// One to launch: built into this module; or, of a user's cell, compiled since, as launch.h's `load` gives it. Neither: there is none.
template <class Loop>
struct Kernel {
  void (*built)(Loop) = nullptr;
  void* loaded = nullptr;
  explicit operator bool() const { return built || loaded; }
};

// Of one cell and precision: persistent ones by kBatchTiles, pointwise ones for the storage type; known ones by kKnownShapes. Null where
// there is none.
struct Kernels {
  ForwardKernel persistent_fwd[3];
  BackwardKernel persistent_bwd[3];
  ForwardKernel pointwise_fwd;
  BackwardKernel pointwise_bwd;
  ForwardKernel known_fwd[kKnownShapeCount];
  BackwardKernel known_bwd[kKnownShapeCount];
};

// Instantiated in instantiate.cu, each cell and precision in an object file of its own.
template <class Formula, Precision kPrecision>
Kernels kernels_of();

// None of them where there is no cell of this name.
Kernels find_kernels(std::string_view cell, Precision precision);

}  // namespace fused_rnn::cuda
