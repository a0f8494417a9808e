"""Connect to the first address that accepts: one attempt after the other, or staggered as in RFC 8305.

Holds: the order of the addresses, the attempts, and the error if all of them fail.
May know: `_addresses`, `_poller`, `_sockets`, `_waiters`, `anyio`, `exceptiongroup`, `socket`.

Source: https://www.rfc-editor.org/rfc/rfc8305
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import TypeAlias

import anyio

from .._poller import Poller
from .._sockets import address_error, bind, connect
from .._waiters import InterruptSafeEvent
from ._addresses import AddressInfo

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

Attempt: TypeAlias = "Callable[[], Awaitable[socket.socket | None]]"


def interleave(addresses: Sequence[AddressInfo], first_family_count: int) -> list[AddressInfo]:
    """Alternate between the families, after `first_family_count` addresses of the first one (RFC 8305, section 4)."""
    families: dict[int, list[AddressInfo]] = {}
    for info in addresses:
        families.setdefault(info[0], []).append(info)
    first = next(iter(families.values()))
    ahead_count = max(first_family_count - 1, 0)
    ahead = first[:ahead_count]
    del first[:ahead_count]
    return ahead + [info for info in chain.from_iterable(zip_longest(*families.values())) if info is not None]


async def connect_to_any(
    poller: Poller,
    addresses: Sequence[AddressInfo],
    local_addresses: Sequence[AddressInfo] | None,
    *,
    delay: float | None,
    all_errors: bool,
) -> socket.socket:
    """Return a non-blocking socket connected to the first address that accepts.

    With a `delay`, in seconds, the next attempt begins when the previous one has failed or has taken that long; they
    then run side by side. Without a `delay` each attempt has to fail before the next one begins. The sockets of all
    other attempts are closed, also after an error.

    Raises:
    - `OSError`: no address accepts; it names every address. With `all_errors`, an `ExceptionGroup` of the errors.
    - `TypeError`: the delay is not a number
    - `OverflowError`: the delay is too large
    """
    if delay is not None:
        delay = max(0.0, delay + 0.0)  # NaN becomes 0, too.
    errors: list[list[OSError]] = [[] for _ in addresses]
    attempts = [partial(attempt, poller, *each, local_addresses) for each in zip(addresses, errors, strict=True)]
    sock = None
    try:
        if delay is None or len(attempts) == 1:
            for each in attempts:
                sock = await each()
                if sock is not None:
                    break
        else:
            sock = await race(attempts, delay)
        if sock is None:
            raise failure([*chain.from_iterable(errors)], all_errors=all_errors)
        return sock
    finally:
        for failures in errors:
            failures.clear()  # Break the cycles: their tracebacks refer to the frames that hold them.


async def race(attempts: Sequence[Attempt], delay: float) -> socket.socket | None:
    """Return the socket of the first attempt that succeeds, or `None` if all of them fail."""
    winner: socket.socket | None = None
    mistake: Exception | None = None

    async def compete(begin: Attempt, failed: InterruptSafeEvent) -> None:
        nonlocal winner, mistake
        try:
            sock = await begin()
        except Exception as exc:  # An invalid address: the caller's mistake, raised as it is.
            mistake = exc
            tasks.cancel_scope.cancel()
            return
        if sock is None:
            failed.set()
        elif winner is None:
            winner = sock
            tasks.cancel_scope.cancel()
        else:
            sock.close()  # Two attempts succeeded at once.

    try:
        async with anyio.create_task_group() as tasks:
            for each in attempts:
                failed = InterruptSafeEvent()
                tasks.start_soon(compete, each, failed)
                with anyio.move_on_after(delay):
                    await failed.wait()
        if mistake is not None:
            raise mistake
    except BaseException:
        if winner is not None:
            winner.close()
        raise
    finally:
        mistake = None  # Break the cycle: its traceback refers to this frame.
    return winner


async def attempt(
    poller: Poller, info: AddressInfo, errors: list[OSError], local_addresses: Sequence[AddressInfo] | None
) -> socket.socket | None:
    """Return a socket connected to an address, or add the reason to `errors` and return `None`."""
    family, kind, proto, address = info
    try:
        sock = socket.socket(family, kind, proto)
    except OSError as exc:
        errors.append(address_error("no socket for address", address, exc))
        return None
    try:
        if local_addresses is None or bind_to_any(sock, local_addresses, errors):
            await connect(poller, sock, address)
            return sock
    except OSError as exc:
        errors.append(exc)
    except BaseException:
        sock.close()
        raise
    sock.close()
    return None


def bind_to_any(sock: socket.socket, addresses: Sequence[AddressInfo], errors: list[OSError]) -> bool:
    """Bind to the first of the addresses that is available, and return whether there is one."""
    for family, _, _, address in addresses:
        if family == sock.family:
            try:
                bind(sock, address)
            except OSError as exc:
                errors.append(exc)
            else:
                return True
    if not errors:
        errors.append(OSError(f"no matching local address with family={sock.family!r} found"))
    return False


def failure(errors: list[OSError], *, all_errors: bool) -> Exception:
    """Return one error that names every address, or with `all_errors` an `ExceptionGroup` of the errors."""
    if all_errors:
        return ExceptionGroup("create_connection failed", errors)
    if len(set(map(str, errors))) == 1:  # One error, or the same local address failed for each remote address.
        return errors[0]
    return OSError(f"Multiple exceptions: {', '.join(map(str, errors))}")
