// From the text of a cell to a program. The text may come from anywhere: every number in it is checked.
#pragma once
#include <string>
#include <string_view>

#include "program.h"

namespace fused_rnn::cpu {

// Whether a cell's name is a program's text.
bool is_program(std::string_view name);

// The program of a text, kept for good, so that a later call finds it; null, and the reason, where there is none that the loops could run.
// From any thread.
const Program* program_of(std::string_view text, std::string& reason);

}  // namespace fused_rnn::cpu
