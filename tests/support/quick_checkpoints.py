"""The command ``undo``, with a checkpoint at least five times a second, so that a test can kill it soon."""

import inspect
import sys

from undo_core.cli import main
from undo_core.training import loop

inspect.unwrap(loop.train).__kwdefaults__["checkpoint_seconds"] = 0.2
if __name__ == "__main__":
    sys.exit(main())
