"""A protocol over a stream of another library: a tunnel through an HTTP proxy that httpcore opens.

    python examples/tcp_echo_server.py --port 8888 &
    python examples/http_tunnel.py --backend trio --proxy http://127.0.0.1:3128 --port 8888

httpcore, the transport layer of httpx, asks the proxy for a tunnel (`CONNECT`, RFC 9110 section 9.3.6) and returns its
own kind of stream. `Tunnel` makes an AnyIO stream of it, and then any protocol can use it. Needs
`pip install httpcore`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import _backend
import httpcore
from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ByteStream, SocketAttribute
from foreign_stream import ask


class Tunnel(ByteStream):
    """httpcore's stream as AnyIO's."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self.stream = stream

    async def receive(self, max_bytes: int = 65536) -> bytes:
        try:
            data = await self.stream.read(max_bytes)
        except httpcore.ReadError as exc:
            raise BrokenResourceError from exc
        if not data:
            raise EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        try:
            await self.stream.write(item)
        except httpcore.WriteError as exc:
            raise BrokenResourceError from exc

    async def send_eof(self) -> None:
        raise NotImplementedError("httpcore cannot close one direction alone")

    async def aclose(self) -> None:
        await self.stream.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            SocketAttribute.local_address: lambda: self.stream.get_extra_info("client_addr"),
            SocketAttribute.remote_address: lambda: self.stream.get_extra_info("server_addr"),
        }


@asynccontextmanager
async def open_tunnel(proxy: str, host: str, port: int) -> AsyncGenerator[Tunnel, None]:
    """A connection to `host` and `port` through an HTTP proxy. Raises `ConnectionError` when it refuses."""
    there = f"{host}:{port}"
    asked = httpcore.URL(proxy)
    url = httpcore.URL(scheme=asked.scheme, host=asked.host, port=asked.port, target=there)
    async with (
        httpcore.AsyncConnectionPool() as pool,
        pool.stream("CONNECT", url, headers={"Host": there}) as response,
    ):
        if not 200 <= response.status < 300:
            raise ConnectionError(f"the proxy answered {response.status} when asked for {there}")
        yield Tunnel(response.extensions["network_stream"])


async def main(proxy: str, host: str, port: int, message: str) -> None:
    async with open_tunnel(proxy, host, port) as tunnel:
        print(f"sent      {message!r}")
        print(f"received  {await ask(message, tunnel)!r}")


if __name__ == "__main__":
    parser = _backend.make_parser("Send a line through an HTTP proxy, and print the line that comes back.")
    parser.add_argument("--proxy", default="http://127.0.0.1:3128", help="URL of the proxy")
    parser.add_argument("--message", default="Hello, is this an echo?", help="what to send")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.proxy, options.host, options.port, options.message)
