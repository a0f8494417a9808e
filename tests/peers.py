"""Peers with blocking sockets, each run by a test as a process of its own: `python peers.py TASK PORT …`."""

from __future__ import annotations

import hashlib
import socket
import sys
import threading


def exchange(port: int, size: int, chunk: int, pauses: int) -> None:
    """Send `size` bytes and read until the end at the same time; print both hashes.

    The reading stops `stops` times, until the test has seen it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.connect(("127.0.0.1", port))
    sent = hashlib.sha256()

    def send() -> None:
        left = size
        number = 0
        while left:
            block = number.to_bytes(8, "big") * 8192
            block = block[:left]
            sock.sendall(block)
            sent.update(block)
            left -= len(block)
            number += 1
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = hashlib.sha256()
    count = 0
    stops = [size * number // (pauses + 1) for number in range(1, pauses + 1)]
    while data := sock.recv(chunk):
        received.update(data)
        count += len(data)
        if stops and count >= stops[0]:
            del stops[0]
            print("waiting")
            sys.stdin.readline()
    sender.join()
    sock.close()
    print(sent.hexdigest(), received.hexdigest(), count)


def late_reader(port: int) -> None:
    """Connect; after a line on standard input read everything; print length and hash."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.connect(("127.0.0.1", port))
    print("connected")
    sys.stdin.readline()
    received = hashlib.sha256()
    count = 0
    while data := sock.recv(65536):
        received.update(data)
        count += len(data)
    sock.close()
    print(count, received.hexdigest())


def flood(port: int) -> None:
    """Connect and send without end."""
    sock = socket.create_connection(("127.0.0.1", port))
    block = bytes(65536)
    print("connected")
    try:
        while True:
            sock.sendall(block)
    except OSError:
        pass


def udp_flood(port: int) -> None:
    """Send datagrams without end."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", port))
    print("flooding")
    try:
        while True:
            sock.send(bytes(512))
    except OSError:
        pass


def http_proxy(refusal: str = "") -> None:
    """Open a tunnel for each CONNECT request, or refuse it with a status; print the port, and each tunnel's end."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def carry(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    while True:
        client, _ = listener.accept()
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        method, where, _ = head.split(maxsplit=2)
        assert method == b"CONNECT"
        if refusal:
            client.sendall(f"HTTP/1.1 {refusal}\r\nContent-Length: 0\r\n\r\n".encode())
            client.close()
            continue
        host, _, port = where.decode().rpartition(":")
        server = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        there = threading.Thread(target=carry, args=(client, server))
        there.start()
        carry(server, client)
        there.join()
        client.close()
        server.close()


def resolve(port: int, name: str) -> None:
    """Ask a name server for the address of `name`, and print it."""
    import dnslib

    answer = dnslib.DNSRecord.parse(dnslib.DNSRecord.question(name).send("127.0.0.1", port, timeout=30))
    print(answer.a.rdata)


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task == "exchange":
        exchange(int(arguments[0]), int(arguments[1]), int(arguments[2]), int(arguments[3]))
    elif task == "late_reader":
        late_reader(int(arguments[0]))
    elif task == "flood":
        flood(int(arguments[0]))
    elif task == "udp_flood":
        udp_flood(int(arguments[0]))
    elif task == "http_proxy":
        http_proxy(*arguments)
    elif task == "resolve":
        resolve(int(arguments[0]), arguments[1])
    else:
        raise SystemExit(f"unknown task {task!r}")
