"""How threads of an op wait for each other where the process is the command line.

They spin, by default for so long that other processes on the same cores cost several times their
share. OpenMP reads the variable when torch is imported, so that only the first import of all can
set it, and it is the whole process's: in a program of others it is theirs to set.
"""

import os
import sys
from pathlib import Path

_COMMAND = Path(sys.argv[0] if sys.argv else "").name in ("segkern", "-m")  # python -m segkern
if _COMMAND and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
