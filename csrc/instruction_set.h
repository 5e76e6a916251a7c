#pragma once

namespace undo {

enum InstructionSet : int { AVX512, AVX2, NEON, PLAIN };

// Whether this machine has the named instruction set.
bool has_instruction_set(const char* name);

// Returns the named instruction set, or the best one of this machine for "". Throws if this machine lacks it.
InstructionSet instruction_set(const char* wanted);

}  // namespace undo
