#pragma once

namespace undo {

enum InstructionSet : int { AVX512, AVX2, PLAIN };

// The one named, or the best that this machine has for "". Throws where this machine lacks it.
InstructionSet instruction_set(const char* wanted);

}  // namespace undo
