"""Prints a table: what each instruction set leaves of the losses' accuracy and of the noise's bits, by dtype and number of threads.

    python tests/matrix.py [--python COMMAND] [--path FOLDERS] [--out docs/results/instruction-sets.md]

A row is an instruction set of the C++ kernels, in a process of its own that checks with undo_kernels.recorded() that it ran. A cell holds
the largest relative errors of the losses' gradients and of their values as the student approaches its teacher from a KL of 1 to 1e-6
(tests/support/near_agreement.py), and whether the noise has its known bits. Torch alone, in the same dtype, has a row beside them. A cell
fails beyond the limits of the numerics contract, for other bits, or if something else ran; the exit status is then 1, and every failing
case is named below the table.

Arm runs in an emulator, where tests/arm.py finds its tools; errors there are those of tests/cpp/kernels.cpp. --python adds rows of
another environment that can import undo_kernels, and --path rows with other folders in PYTHONPATH, as with another version of torch.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / "tests/support"), str(ROOT / "bench")]  # not tests/, whose undo_kernels/ holds tests

from instruction_matrix import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(__doc__, sys.argv[1:]))
