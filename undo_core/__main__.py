import sys

from undo_core.cli import main

sys.exit(main())
