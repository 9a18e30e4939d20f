"""Memory that a process frees stays with it, for commands that train on a CPU.

By default the GNU C library hands every block above 32 MiB back to the system when it is freed, and the next one of that size
is given new pages, which the system fills with zeros first: for feature maps of 224 pixels that took a third of a training
step (docs/lab/speed.md). Commands that train ask it to keep them. A program of your own is left as it is.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
_SIZE = 2**30


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed, up to 1 GiB at a time.

    Returns:
        Whether it does; False where it is not the GNU one.
    """
    if sys.platform != "linux":
        return False
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    return tune is not None and all(tune(option, _SIZE) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
