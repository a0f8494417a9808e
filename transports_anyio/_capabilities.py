"""What the system can do where systems differ: the tests set other values, to run what another system needs.

Holds: the values, which are looked up when they are needed.
May know: nothing.
"""

from __future__ import annotations

import sys

#: Whether the file descriptor of a pipe can be polled, and so can one that stands for a child. Windows polls sockets
#: only; threads wait there for everything else.
polls_files: bool = sys.platform != "win32"
