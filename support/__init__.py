"""Code that the tutorial's scripts rely on, but that a learner need not read.

Nothing here imports a script. Functions take values; only `base.options` and `base.command_line`
use flags.

Importing the package ends the process on a system that the scripts do not support. Every script
imports it before TensorFlow.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - older versions come this far
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"error: the scripts need Python 3.11 or newer; this is Python {version}")

# The scripts read files while they are locked and delete files while they are open. Windows allows
# neither. TensorFlow itself can be installed there, so nothing else would stop the user. The module
# fcntl exists on Linux, which includes WSL, and on macOS.
try:
    import fcntl  # noqa: F401
except ImportError:
    sys.exit(
        "error: the scripts do not run on native Windows; use the Windows Subsystem for Linux "
        "(WSL), Linux or macOS"
    )
