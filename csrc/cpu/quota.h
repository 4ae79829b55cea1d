// How many processors' time this process may take, by its control groups.
#pragma once
#include <string>

namespace fused_rnn::cpu {

// Rounded up; INT_MAX where nothing limits it. root: what stands before /proc and /sys.
int quota(const std::string& root = "");

}  // namespace fused_rnn::cpu
