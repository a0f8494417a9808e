"""Look at the exit status of a child without reaping it.

Holds: the calls of `os.waitid`.
May know: `os`.
"""

from __future__ import annotations

import os
import sys

# The return code that asyncio reports if other code has reaped the child.
UNKNOWN_STATUS = 255


def poll_exit_status(pid: int, *, wait: bool = False) -> int | None:
    """Return the return code of a child, or `None` while it runs; with `wait`, wait for its end. Does not reap it.

    Raises `ChildProcessError` if the child has been reaped, or `pid` is not a child of this process.
    """
    if sys.platform == "win32":
        raise NotImplementedError
    assert hasattr(os, "waitid")
    options = os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)
    while True:
        found = os.waitid(os.P_PID, pid, options)
        if found is None:
            return None
        if found.si_code != os.CLD_STOPPED:
            status: int = found.si_status
            return status if found.si_code == os.CLD_EXITED else -status
        # macOS also reports children that are stopped. This call removes that report.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)


def is_child(pid: int) -> bool:
    """Return whether `pid` is a child that is not reaped yet; false if the platform cannot tell without reaping."""
    if not hasattr(os, "waitid"):
        return False
    try:
        poll_exit_status(pid)
    except ChildProcessError:
        return False
    return True
