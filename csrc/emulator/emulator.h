// The host meaning of csrc/cuda/primitives: g++ compiles a kernel's very source, and the CPU runs it.
//
// Every CUDA thread is a fiber. A seed draws the order in which they run; a copy or a remote store that the hardware
// may deliver later is delivered later; what the hardware answers with a hang, an illegal address or silent garbage
// ends in a std::runtime_error that says where. Build once plainly, once with -fsanitize=address,undefined and once
// with -DFUSED_RNN_EMULATE_RACES -fsanitize=thread (compile only: the program is linked
// without that flag): each finds what the others do not.
//
// It cannot find wrong PTX, weak memory beyond what a happens-before relation shows, bank conflicts, or anything about speed.
#pragma once
#include "launch.h"
#include "matrix.h"
