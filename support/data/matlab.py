"""Reads arrays from MATLAB files in a separate process, because damaged files can crash SciPy."""

import importlib.util
import io
import os
import signal
import subprocess
import sys

import numpy as np

from support.base.errors import UserError

TIMEOUT = 300  # seconds

# What the process runs. Its last line on stderr gives the reason if it fails.
_PROGRAM = """
import io, resource, sys
_, most = resource.getrlimit(resource.RLIMIT_DATA)
limit = 4 << 30 if most == resource.RLIM_INFINITY else min(most, 4 << 30)  # bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
import numpy, scipy.io
path, *names = sys.argv[1:]
arrays = scipy.io.loadmat(path, variable_names=names)
for name in names:
    if name not in arrays or arrays[name].dtype.kind not in "iuf":
        sys.exit(f"it has no array {name} of numbers")
    if arrays[name].nbytes > 1 << 30:
        sys.exit(f"its array {name} is too large")
    content = io.BytesIO()  # because NumPy cannot write to every pipe
    numpy.save(content, arrays[name], allow_pickle=False)
    sys.stdout.buffer.write(content.getbuffer())
"""


def load_arrays(path, names):
    """Returns the arrays of these names in a MATLAB file, in this order.

    Raises:
      ValueError: the file cannot be read, or has no such arrays of numbers.
      UserError: SciPy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UserError(
            "--svhn needs SciPy to read MATLAB files: pip install -r requirements-svhn.txt"
        )
    # -P: no modules from the current folder. One thread, because the memory is limited.
    command = [sys.executable, "-P", "-c", _PROGRAM, path, *names]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    try:
        process = subprocess.run(
            command, capture_output=True, check=False, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"reading it takes more than {TIMEOUT} s") from error
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise ValueError(f"it is damaged: it makes SciPy crash with {name}")
    if process.returncode:
        raise ValueError(process.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    file = io.BytesIO(process.stdout)
    return [np.load(file, allow_pickle=False) for _ in names]
