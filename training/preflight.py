"""Before a program imports anything that may be missing: what is not installed is told in one line.

Every entry point imports this first, by its own name: Python puts the folder of the program that it runs on the path, and not the
project's, which may not be installed either.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (it may be started with any)
    sys.exit(f"Python 3.11 or newer is needed, and {sys.executable} is {sys.version.split()[0]}: make venv PYTHON=python3.11")

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what is installed comes first

from ladir.installation import tell_in_one_line

tell_in_one_line()

# Segments that grow leave few holes between batches of different lengths.  PyTorch reads this when it is imported, under either
# name; what the user says comes first.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
