"""Read 64 MiB from a port, slowly, and close."""

import socket
import sys
import time

with socket.socket() as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
    sock.connect(("127.0.0.1", int(sys.argv[1])))
    count = 0
    pauses = 0
    while count < 64 << 20:
        data = sock.recv(1 << 18)
        assert data
        count += len(data)
        if count >> 20 > pauses:
            pauses += 1
            time.sleep(0.005)
