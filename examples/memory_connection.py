"""Try a protocol without a network: two protocols, connected in memory.

    python examples/memory_connection.py --backend trio --chunk-size 1

`transports_anyio.testing.memory_connection` gives both ends real transports, with flow control and half-close, and can
cut the stream into chunks of any size. A protocol that relies on whole messages fails at once with `--chunk-size 1`.
"""

from __future__ import annotations

import _backend
import anyio

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup
from transports_anyio.testing import Recorder, memory_connection

MAX_SIZE = 100_000
MAX_DIGITS = len(str(MAX_SIZE))


class Netstrings(Protocol):
    """Strings of bytes with their size in front, as in `5:hello,` (https://cr.yp.to/proto/netstrings.txt)."""

    transport: Transport

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.finished = anyio.Event()

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        start = 0  # Where the next string begins. The buffer is cut once, and not for each string.
        while not self.transport.is_closing():
            colon = self.buffer.find(b":", start, start + MAX_DIGITS + 1)
            digits = self.buffer[start : colon if colon >= 0 else start + MAX_DIGITS + 1]
            if colon < 0 and len(digits) <= MAX_DIGITS and (digits.isdigit() or not digits):
                break  # The size is incomplete.
            if colon < 0 or not digits.isdigit() or int(digits) > MAX_SIZE:
                self.transport.abort()
                return
            end = colon + 1 + int(digits)
            if len(self.buffer) <= end:
                break  # The string is incomplete.
            if self.buffer[end : end + 1] != b",":
                self.transport.abort()
                return
            start = end + 1
            self.string_received(bytes(self.buffer[colon + 1 : end]))
        del self.buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self.finished.set()

    def send(self, string: bytes) -> None:
        self.transport.write(b"%d:%s," % (len(string), string))

    def string_received(self, string: bytes) -> None:
        """Handle a complete string."""


class Reverser(Netstrings):
    """Answer every string with its reverse."""

    def string_received(self, string: bytes) -> None:
        self.send(string[::-1])


class Asker(Netstrings):
    """Send strings, collect the answers, and close when there is one for each."""

    def __init__(self, questions: list[bytes]) -> None:
        super().__init__()
        self.questions = questions
        self.answers: list[bytes] = []

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        for question in self.questions:
            self.send(question)

    def string_received(self, string: bytes) -> None:
        self.answers.append(string)
        if len(self.answers) == len(self.questions):
            self.transport.close()


async def converse(questions: list[bytes], chunk_size: int | None) -> tuple[list[bytes], int]:
    """Return the answers, and how often `data_received` was called for the questions."""
    async with TransportGroup() as group:
        (_, asker), (_, recorder) = await memory_connection(
            group, lambda: Asker(questions), lambda: Recorder(Reverser()), chunk_size=chunk_size
        )
        await asker.finished.wait()
    recorder.check()  # The order of callbacks was legal, and `connection_lost` came.
    return asker.answers, recorder.count("data_received")


async def main(words: list[str], chunk_size: int | None) -> None:
    answers, chunks = await converse([word.encode() for word in words], chunk_size)
    for word, answer in zip(words, answers, strict=True):
        print(f"{word!r} backwards is {answer.decode(errors='replace')!r}")
    print(f"the questions came in {chunks} chunk{'s' if chunks > 1 else ''}")


if __name__ == "__main__":
    parser = _backend.make_parser("Have words reversed by a protocol at the other end of a connection in memory.")
    parser.add_argument("--chunk-size", type=int, help="how many bytes are received at a time at most")
    parser.add_argument("words", nargs="*", default=["stressed", "desserts"], help="what to reverse")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.words, options.chunk_size)
