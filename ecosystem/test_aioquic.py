"""aioquic: QUIC over our datagram endpoints."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import DatagramFrameReceived, QuicEvent
from peers import HOST, Tls


class Service(QuicConnectionProtocol):
    """Send each datagram frame back."""

    def quic_event_received(self, event: QuicEvent) -> None:
        super().quic_event_received(event)
        if isinstance(event, DatagramFrameReceived):
            self._quic.send_datagram_frame(event.data.upper())
            self.transmit()


def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async def run() -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.write_eof()

    task = asyncio.get_running_loop().create_task(run())
    running.add(task)
    task.add_done_callback(running.discard)


running: set[Any] = set()


async def start(tls: Tls) -> tuple[QuicServer, int, QuicConfiguration]:
    configuration = QuicConfiguration(alpn_protocols=["echo"], is_client=False, max_datagram_frame_size=65536)
    configuration.load_cert_chain(tls.certificate, tls.key)
    server = await serve(HOST, 0, configuration=configuration, create_protocol=Service, stream_handler=echo)
    port = server._transport.get_extra_info("sockname")[1]
    client = QuicConfiguration(alpn_protocols=["echo"], server_name="localhost", max_datagram_frame_size=65536)
    client.load_verify_locations(cafile=str(tls.authority))
    return server, port, client


async def test_streams(tls: Tls) -> None:
    server, port, configuration = await start(tls)
    sent = os.urandom(500_000)
    async with connect(HOST, port, configuration=configuration) as connection:
        await connection.ping()

        async def talk() -> None:
            reader, writer = await connection.create_stream()
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == sent

        await asyncio.gather(*(talk() for _ in range(4)))
        connection.change_connection_id()
        await connection.ping()
        await talk()
    server.close()


async def test_datagram_frames(tls: Tls) -> None:
    server, port, configuration = await start(tls)
    came: asyncio.Queue[bytes] = asyncio.Queue()

    class Client(QuicConnectionProtocol):
        def quic_event_received(self, event: QuicEvent) -> None:
            super().quic_event_received(event)
            if isinstance(event, DatagramFrameReceived):
                came.put_nowait(event.data)

    async with connect(HOST, port, configuration=configuration, create_protocol=Client) as connection:
        connection._quic.send_datagram_frame(b"hello")  # type: ignore[attr-defined]
        connection.transmit()
        assert await came.get() == b"HELLO"
    server.close()


async def test_a_certificate_that_is_not_trusted(tls: Tls) -> None:
    server, port, _ = await start(tls)
    stranger = QuicConfiguration(alpn_protocols=["echo"], server_name="localhost")
    with pytest.raises(ConnectionError):
        async with connect(HOST, port, configuration=stranger):
            pass
    server.close()


async def test_the_server_goes_away(tls: Tls) -> None:
    server, port, configuration = await start(tls)
    async with connect(HOST, port, configuration=configuration) as connection:
        await connection.ping()
        server.close()
        await connection.wait_closed()
