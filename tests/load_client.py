"""The client of many connections, in a process of its own: `python load_client.py PORT COUNT`."""

from __future__ import annotations

import selectors
import socket
import struct
import sys

#: The number of connections made at the same time: less than any server's backlog.
AT_ONCE = 50


def main(port: int, count: int) -> None:
    """Open all, send a number over each and wait for it to come back, then say so and wait for the ends."""
    socks: list[socket.socket] = []
    for number in range(count):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(struct.pack("<I", number))
        socks.append(sock)
        if number % AT_ONCE == AT_ONCE - 1 or number == count - 1:
            # The server has accepted this connection, and therefore all earlier ones.
            assert sock.recv(4, socket.MSG_PEEK)
    print("connected", flush=True)
    sys.stdin.readline()
    # All at once, twice: what was sent before is answered, and then one more message for each.
    for number, sock in enumerate(socks):
        sock.sendall(struct.pack("<I", ~number & 0xFFFFFFFF))
    for number, sock in enumerate(socks):
        answer = b""
        while len(answer) < 8:
            more = sock.recv(8 - len(answer))
            assert more
            answer += more
        assert answer == struct.pack("<II", number, ~number & 0xFFFFFFFF)
    print("echoed", flush=True)
    ends = 0
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ)
        while ends < count:
            for key, _ in selector.select(60):
                assert key.fileobj.recv(1) == b""  # type: ignore[union-attr]
                selector.unregister(key.fileobj)
                ends += 1
    print("ended", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
