"""Connecting to the first of many addresses that answers: one after the other, or staggered as in RFC 8305.

Source: https://www.rfc-editor.org/rfc/rfc8305
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

import anyio

from .._waiters import Event
from ._addresses import BIND_FAILED, AddressInfo, address_error

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


def interleave(addresses: Sequence[AddressInfo], first_family_count: int) -> list[AddressInfo]:
    """Let the families take turns, after `first_family_count` addresses of the first one (RFC 8305, section 4)."""
    families: dict[int, list[AddressInfo]] = {}
    for info in addresses:
        families.setdefault(info[0], []).append(info)
    first = next(iter(families.values()))
    ahead_count = max(first_family_count - 1, 0)
    ahead = first[:ahead_count]
    del first[:ahead_count]
    return ahead + [info for info in chain.from_iterable(zip_longest(*families.values())) if info is not None]


class Attempts:
    """The attempts at connecting to a list of addresses, and why each of them failed."""

    def __init__(self, addresses: Sequence[AddressInfo], local_addresses: Sequence[AddressInfo] | None = None) -> None:
        self._addresses = addresses
        self._local_addresses = local_addresses
        self._errors: list[list[OSError]] = [[] for _ in addresses]

    async def run(self, delay: float | None) -> socket.socket | None:
        """Return a non-blocking socket connected to the first address that accepts, `None` when none does.

        With a `delay` (seconds) each attempt gets a head start of so long before the next one begins beside it;
        without one, it is given up before the next begins. Whatever happens, no socket of another attempt stays open.
        Raises `TypeError` for a delay that is no number, `OverflowError` for one that is too large.
        """
        if delay is not None:
            delay = max(0.0, delay + 0.0)  # 0 for NaN, too: it is no head start.
        if delay is None or len(self._addresses) == 1:
            for number in range(len(self._addresses)):
                sock = await self._try(number)
                if sock is not None:
                    return sock
            return None
        return await self._race(delay)

    async def _race(self, delay: float) -> socket.socket | None:
        winner: socket.socket | None = None
        mistake: Exception | None = None

        async def compete(number: int, failed: Event) -> None:
            nonlocal winner, mistake
            try:
                sock = await self._try(number)
            except Exception as exc:  # Of the caller's, an address that is none: it comes out alone.
                mistake = exc
                tasks.cancel_scope.cancel()
                return
            if sock is None:
                failed.set()
            elif winner is None:
                winner = sock
                tasks.cancel_scope.cancel()
            else:
                sock.close()  # Two have won in the same turn.

        try:
            async with anyio.create_task_group() as tasks:
                for number in range(len(self._addresses)):
                    failed = Event()
                    tasks.start_soon(compete, number, failed)
                    with anyio.move_on_after(delay):
                        await failed.wait()
            if mistake is not None:
                raise mistake
        except BaseException:
            if winner is not None:
                winner.close()
            raise
        finally:
            mistake = None  # Its traceback has this frame: no cycle.
        return winner

    async def _try(self, number: int) -> socket.socket | None:
        family, kind, proto, address = self._addresses[number]
        errors = self._errors[number]
        try:
            sock = socket.socket(family, kind, proto)
        except OSError as exc:
            errors.append(address_error("no socket for address", address, exc))
            return None
        try:
            if self._bind(sock, errors):
                await connect(sock, address)
                return sock
        except OSError as exc:
            errors.append(exc)
        except BaseException:
            sock.close()
            raise
        sock.close()
        return None

    def failure(self, *, all_errors: bool) -> Exception:
        """Return one error that names every address tried, or with `all_errors` an `ExceptionGroup` of one for each."""
        errors = [*chain.from_iterable(self._errors)]  # In the order of the addresses.
        if all_errors:
            return ExceptionGroup("create_connection failed", errors)
        if len(set(map(str, errors))) == 1:  # One, or a local address that failed again for each remote one.
            return errors[0]
        return OSError(f"Multiple exceptions: {', '.join(map(str, errors))}")

    def forget(self) -> None:
        """Let go of the errors, whose tracebacks have the frames that hold them: no cycle."""
        for errors in self._errors:
            errors.clear()

    def _bind(self, sock: socket.socket, errors: list[OSError]) -> bool:
        """Bind to the first local address that can be had; whether there is one, or none was asked for."""
        if self._local_addresses is None:
            return True
        for family, _, _, address in self._local_addresses:
            if family == sock.family:
                try:
                    sock.bind(address)
                except OSError as exc:
                    errors.append(address_error(BIND_FAILED, address, exc))
                else:
                    return True
        if not errors:
            errors.append(OSError(f"no matching local address with family={sock.family!r} found"))
        return False


async def connect(sock: socket.socket, address: Any) -> None:
    """Make `sock` non-blocking and connect it. Raises an `OSError` that names the address."""
    try:
        sock.setblocking(False)
        try:
            sock.connect(address)
        except (BlockingIOError, InterruptedError) as exc:
            # EAGAIN does not mean that it goes on by itself: the backlog of a UNIX server is full (connect(2)).
            if exc.errno == errno.EAGAIN:
                raise
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
    except OSError as exc:
        raise address_error("Connect call failed", address, exc) from exc


async def connect_to_any(
    addresses: Sequence[AddressInfo],
    local_addresses: Sequence[AddressInfo] | None,
    *,
    delay: float | None,
    all_errors: bool,
) -> socket.socket:
    """Return a socket connected to the first address that accepts, as `Attempts.run`.

    Raises an `OSError` that names every address tried, or with `all_errors` an `ExceptionGroup` of one for each.
    """
    attempts = Attempts(addresses, local_addresses)
    try:
        sock = await attempts.run(delay)
        if sock is None:
            raise attempts.failure(all_errors=all_errors)
        return sock
    finally:
        attempts.forget()
