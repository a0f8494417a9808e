"""The load generator in Python, for machines without a C compiler: as load.c, with the same arguments, and slower."""

from __future__ import annotations

import os
import select
import selectors
import socket
import ssl
import struct
import sys
import time
from pathlib import Path

HOST = "127.0.0.1"
RESET = struct.pack("ii", 1, 0)


PROBES = 4
PROBE_SIZE = 1024
PROBE_PAUSE = 0.001


class Connection:
    """One request under way at a time."""

    def __init__(self, load: Load, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self.load = load
        self.port = port or load.port
        self.context = context
        self.payload, self.size = load.payload, load.size
        self.to_receive = 0
        self.open()

    def open(self) -> None:
        load = self.load
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if load.mode == "udp" else socket.SOCK_STREAM)
        if load.mode != "udp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if load.mode == "conn":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.connect((HOST, self.port))
        if load.opening:
            sock.sendall(load.opening)
            sock.recv(load.opening_size, socket.MSG_WAITALL)
        self.sock = self.context.wrap_socket(sock) if self.context else sock
        self.sock.setblocking(False)
        load.selector.register(self.sock, selectors.EVENT_READ, self)

    def start(self) -> None:
        self.to_send, self.to_receive = len(self.payload), self.size
        self.request()

    def request(self) -> None:
        while self.to_send:
            try:
                self.to_send -= self.sock.send(self.payload[len(self.payload) - self.to_send :])
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                break
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.to_send else 0)
        if self.load.selector.get_key(self.sock).events != events:
            self.load.selector.modify(self.sock, events, self)

    def ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self.request()
        while True:
            try:
                data = self.sock.recv(1 << 18)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not data and self.load.mode != "udp":
                sys.exit("the server closed a connection")
            self.to_receive -= len(data)
            if self.to_receive <= 0:
                break
        self.load.answers += 1
        if self.load.mode == "conn":
            self.load.selector.unregister(self.sock)
            self.sock.close()
        if self.load.stopping:
            return
        if self.load.mode == "conn":
            self.open()
        self.start()


class Probe(Connection):
    """A connection with small messages, whose round trips are measured."""

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self.payload, self.size = bytes(PROBE_SIZE), PROBE_SIZE
        self.since = 0.0  # When the request under way began, or the last answer came.

    def poll(self) -> None:
        if not self.to_receive:
            if not self.load.stopping and time.monotonic() - self.since >= PROBE_PAUSE:
                self.since = time.monotonic()
                self.start()
            return
        try:
            self.to_receive -= len(self.sock.recv(self.to_receive))
        except BlockingIOError:
            return
        if not self.to_receive:
            now = time.monotonic()
            self.load.round_trips.append(now - self.since)
            self.since = now

    def ready(self, events: int) -> None:
        """Do nothing: `poll` is called all the time."""


class Load:
    def __init__(self, mode: str, port: int, connections: int, size: int, seconds: float) -> None:
        self.mode, self.port, self.size, self.seconds = mode, port, size, seconds
        self.payload = bytes(size)
        self.opening = b""
        if mode == "talk":
            self.payload = Path(os.environ["LOAD_REQUEST"]).read_bytes()
            if "LOAD_OPENING" in os.environ:
                self.opening = Path(os.environ["LOAD_OPENING"]).read_bytes()
                self.opening_size = int(os.environ["LOAD_OPENING_SIZE"])
        self.answers = 0
        self.stopping = False
        context: ssl.SSLContext | None = None
        if mode in {"tls", "mixed"}:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self.selector = selectors.DefaultSelector()
        self.probes: list[Probe] = []
        self.round_trips: list[float] = []
        if mode == "mixed":
            tls_port = int(os.environ["LOAD_TLS_PORT"])
            self.probes = [Probe(self) for _ in range(PROBES)]
            self.connections = [Connection(self) for _ in range(connections // 2)]
            self.connections += [Connection(self, tls_port, context) for _ in range(connections - connections // 2)]
        else:
            self.connections = [Connection(self, context=context) for _ in range(connections)]
        self.idle = [Connection(self, context=context) for _ in range(int(os.environ.get("LOAD_IDLE", "0")))]

    def run(self) -> None:
        print("open", flush=True)
        sys.stdin.readline()
        begin = last = time.monotonic()
        for connection in self.connections:
            connection.start()
        expected = 0
        while not self.stopping or (self.answers < expected and time.monotonic() - last < 0.2):
            batch = self.selector.select(PROBE_PAUSE if self.probes else 0.1)
            self.probe()
            for key, events in batch:
                key.data.ready(events)
                self.probe()  # Between the bulk, too: it must not delay what is measured.
            now = time.monotonic()
            if batch:
                last = now
            if not self.stopping and now >= begin + self.seconds:
                self.stopping = True
                expected = self.answers + len(self.connections)
            elif self.mode == "udp" and now - last > 0.2:
                for connection in self.connections:  # A datagram was dropped: ask again.
                    connection.start()
        print(self.answers, time.monotonic() - begin, *self.percentiles(), flush=True)
        sys.stdin.read()

    def probe(self) -> None:
        for probe in self.probes:
            probe.poll()

    def percentiles(self) -> list[float]:
        """Return the round trips of the probes in microseconds: p50, p99 and p99.9."""
        found = sorted(self.round_trips)
        return [found[round(share * (len(found) - 1))] * 1e6 for share in (0.5, 0.99, 0.999) if found]


def serve(seconds: float) -> None:
    """Accept and close connections, until none has come for that long."""
    answers = 0
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(1024)
        print(listener.getsockname()[1], flush=True)
        while select.select([listener], [], [], seconds)[0]:
            sock, _ = listener.accept()
            while sock.recv(1 << 16):
                pass
            sock.close()
            answers += 1
    print(answers)


if __name__ == "__main__":
    mode, port, connections, size, seconds = sys.argv[1:]
    if mode == "serve":
        serve(float(seconds))
    else:
        Load(mode, int(port), int(connections), int(size), float(seconds)).run()
