"""Read everything from a port, slowly."""

import socket
import sys
import time

with socket.socket() as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
    sock.connect(("127.0.0.1", int(sys.argv[1])))
    count = 0
    pauses = 0
    while data := sock.recv(1 << 18):
        count += len(data)
        if count >> 20 > pauses:
            pauses += 1
            time.sleep(0.005)
assert count == 64 << 20, count
