"""Removes an unusable MPLBACKEND from the environment, with which matplotlib could not be imported.

A notebook passes its own backend (``module://matplotlib_inline.backend_inline``) to the commands that it starts, also in an
environment without that package. The report's figures need no backend.
"""

import importlib.util
import os

_module = os.environ.get("MPLBACKEND", "").removeprefix("module://").partition(".")[0]
if os.environ.get("MPLBACKEND", "").startswith("module://") and importlib.util.find_spec(_module) is None:
    del os.environ["MPLBACKEND"]
