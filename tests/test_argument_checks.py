"""Invalid arguments, one and two at a time: asyncio's error, and of two the one that asyncio finds first.

Each table has the mistakes that can be made with one endpoint function in the order in which asyncio looks for them.
The oracle proves the order; every pair of mistakes that can be made together has to raise the error of the first.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest
from datagram_helpers import Endpoint
from network import AF_UNIX, needs_pipes, needs_unix
from support import HOST, Recorder, Stack, collect_contexts, connected, open_descriptors, until

pytestmark = pytest.mark.anyio


class Kind:
    """A placeholder for an object that is made for each test."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


#: Not given at all: with what needs it to be given, a mistake cannot be made.
ABSENT = Kind("absent")
#: Given; its value makes no difference.
ANY = Kind("any")
STREAM, UNIX_STREAM, DATAGRAM, SEQPACKET, TLS, CONTEXT, TRANSPORT, ENDPOINT, CLOSED, TEXT, BINARY = map(
    Kind,
    "stream unix_stream datagram seqpacket tls context transport endpoint closed text binary".split(),
)


class Nothing:
    """Has no attributes."""

    def __repr__(self) -> str:
        return "nothing"


OBJECT = Nothing()


class Mistake(NamedTuple):
    options: dict[str, Any]
    error: type[Exception]
    message: str
    #: Whether asyncio does not notice it, or only after it has begun.
    only_ours: bool = False


def refused_without_tls(*, absent: tuple[str, ...] = ("ssl",)) -> list[Mistake]:
    nothing = dict.fromkeys(absent, ABSENT)
    return [
        Mistake({"ssl_handshake_timeout": 1, **nothing}, ValueError, "ssl_handshake_timeout is only meaningful with"),
        Mistake({"ssl_shutdown_timeout": 1, **nothing}, ValueError, "ssl_shutdown_timeout is only meaningful with"),
    ]


def wrong_sockets(option: str, *kinds: Any, message: str) -> list[Mistake]:
    return [Mistake({option: kind}, ValueError, message) for kind in kinds]


AT_THE_SAME_TIME = "can not be specified at the same time"
NO_SOCKET = Mistake({"sock": OBJECT}, AttributeError, "'Nothing' object has no attribute")

TABLES: dict[str, list[Mistake]] = {
    "create_connection": [
        Mistake({"server_hostname": "x", "ssl": ABSENT}, ValueError, "server_hostname is only meaningful with ssl"),
        Mistake({"ssl": CONTEXT, "host": ABSENT}, ValueError, "You must set server_hostname when using ssl without"),
        *refused_without_tls(),
        Mistake({"sock": TLS}, TypeError, "Socket cannot be of type SSLSocket"),
        Mistake({"host": HOST, "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"port": 1, "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"host": "", "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"host": ABSENT, "port": ABSENT, "sock": ABSENT}, ValueError, "host and port was not specified and no"),
        *wrong_sockets("sock", DATAGRAM, SEQPACKET, message="A Stream Socket was expected, got <socket"),
        NO_SOCKET,
        Mistake({"sock": 5}, AttributeError, "'int' object has no attribute 'type'"),
    ],
    "create_server": [
        Mistake({"ssl": True}, TypeError, "ssl argument must be an SSLContext or None"),
        Mistake({"ssl": False}, TypeError, "ssl argument must be an SSLContext or None"),
        *refused_without_tls(),
        Mistake({"sock": TLS}, TypeError, "Socket cannot be of type SSLSocket"),
        Mistake({"host": HOST, "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"port": 1, "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"host": [], "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"host": ABSENT, "port": ABSENT, "sock": ABSENT}, ValueError, "Neither host/port nor sock were"),
        *wrong_sockets("sock", DATAGRAM, SEQPACKET, message="A Stream Socket was expected, got <socket"),
        NO_SOCKET,
        Mistake({"host": 5, "port": 1, "sock": ABSENT}, TypeError, "."),
    ],
    "connect_accepted_socket": [
        *wrong_sockets("sock", DATAGRAM, SEQPACKET, message="A Stream Socket was expected, got <socket"),
        NO_SOCKET,
        Mistake({"sock": None}, AttributeError, "'NoneType' object has no attribute 'type'"),
        *[mistake._replace(options={"sock": STREAM, **mistake.options}) for mistake in refused_without_tls()],
        *[mistake._replace(options={"sock": TLS, **mistake.options}) for mistake in refused_without_tls()],
        Mistake({"sock": TLS}, TypeError, "Socket cannot be of type SSLSocket"),
    ],
    "create_unix_connection": [
        Mistake({"ssl": CONTEXT, "server_hostname": ABSENT}, ValueError, "server_hostname when using ssl"),
        Mistake({"server_hostname": "x", "ssl": ABSENT}, ValueError, "server_hostname is only meaningful with ssl"),
        *refused_without_tls(),
        Mistake({"path": "/nowhere", "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"path": 5, "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"path": 5, "sock": ABSENT}, TypeError, "expected str, bytes or os.PathLike object, not int"),
        Mistake({"path": ABSENT, "sock": ABSENT}, ValueError, "no path and sock were specified"),
        *wrong_sockets("sock", STREAM, DATAGRAM, SEQPACKET, TLS, message="A UNIX Domain Stream Socket was expected"),
        NO_SOCKET,
    ],
    "create_unix_server": [
        Mistake({"ssl": True}, TypeError, "ssl argument must be an SSLContext or None"),
        *refused_without_tls(),
        Mistake({"path": "/nowhere", "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"path": 5, "sock": ANY}, ValueError, AT_THE_SAME_TIME),
        Mistake({"path": 5, "sock": ABSENT}, TypeError, "expected str, bytes or os.PathLike object, not int"),
        Mistake({"path": ABSENT, "sock": ABSENT}, ValueError, "path was not specified, and no sock specified"),
        *wrong_sockets("sock", STREAM, DATAGRAM, SEQPACKET, TLS, message="A UNIX Domain Stream Socket was expected"),
        NO_SOCKET,
    ],
    "create_datagram_endpoint": [
        *wrong_sockets("sock", STREAM, UNIX_STREAM, TLS, message="A datagram socket was expected, got <"),
        Mistake({"sock": SEQPACKET}, ValueError, "A datagram socket was expected, got <socket", only_ours=True),
        NO_SOCKET,
        *[
            Mistake({"sock": DATAGRAM, name: value}, ValueError, f"can not be used when sock is specified. .*{name}")
            for name, value in (
                ("local_addr", 5),
                ("remote_addr", (HOST, 0)),
                ("family", socket.AF_INET),
                ("proto", 17),
                ("flags", 1),
                ("reuse_port", True),
                ("allow_broadcast", True),
            )
        ],
        Mistake(
            dict.fromkeys(("sock", "local_addr", "remote_addr", "family"), ABSENT),
            ValueError,
            "unexpected address family",
        ),
        Mistake({"sock": ABSENT, "family": AF_UNIX, "local_addr": 5}, TypeError, "string is expected"),
        Mistake({"sock": ABSENT, "family": AF_UNIX, "remote_addr": (HOST, 1)}, TypeError, "string is expected"),
        Mistake({"sock": ABSENT, "family": ABSENT, "local_addr": "localhost"}, TypeError, "2-tuple is expected"),
        Mistake(
            {"sock": ABSENT, "family": ABSENT, "local_addr": (HOST, 0, 0), "remote_addr": ABSENT},
            TypeError,
            "2-tuple is expected",
        ),
        Mistake({"sock": ABSENT, "family": ABSENT, "local_addr": ("no such host.invalid", 0)}, socket.gaierror, "."),
        Mistake({"sock": ABSENT, "family": ABSENT, "remote_addr": [HOST, 1]}, TypeError, "2-tuple is expected"),
    ],
    "start_tls": [
        Mistake({"transport": ANY, "sslcontext": None}, TypeError, "sslcontext is expected to be an instance of"),
        Mistake({"transport": ANY, "sslcontext": True}, TypeError, "sslcontext is expected to be an instance of"),
        Mistake({"transport": ENDPOINT, "sslcontext": CONTEXT}, TypeError, "is not supported by start_tls"),
        Mistake({"transport": None, "sslcontext": CONTEXT}, TypeError, "transport None is not supported by start_tls"),
        *[
            Mistake(
                {"transport": TRANSPORT, "sslcontext": CONTEXT, name: 0}, ValueError, f"{name} should be a positive"
            )
            for name in ("ssl_handshake_timeout", "ssl_shutdown_timeout")
        ],
    ],
    "sendfile": [
        Mistake({"transport": CLOSED, "file": ANY}, RuntimeError, "Transport is closing"),
        Mistake({"transport": ENDPOINT, "file": ANY}, RuntimeError, "sendfile is not supported for transport"),
        Mistake({"transport": TRANSPORT, "file": TEXT}, ValueError, "file should be opened in binary mode"),
        *[
            Mistake({"transport": TRANSPORT, "file": BINARY, **options}, error, message)
            for options, error, message in (
                ({"count": "1"}, TypeError, "count must be a positive integer"),
                ({"count": 0}, ValueError, "count must be a positive integer"),
                ({"offset": None}, TypeError, "offset must be a non-negative integer"),
                ({"offset": -1}, ValueError, "offset must be a non-negative integer"),
            )
        ],
    ],
    "subprocess_exec": [
        Mistake({"universal_newlines": True}, ValueError, "universal_newlines must be False"),
        Mistake({"shell": True}, ValueError, "shell must be False"),
        Mistake({"bufsize": 1}, ValueError, "bufsize must be 0"),
        Mistake({"text": True}, ValueError, "text must be False"),
        Mistake({"encoding": "ascii"}, ValueError, "encoding must be None"),
        Mistake({"errors": "strict"}, ValueError, "errors must be None"),
    ],
    "subprocess_shell": [
        Mistake({"cmd": 5}, ValueError, "cmd must be a string"),
        Mistake({"universal_newlines": True}, ValueError, "universal_newlines must be False"),
        Mistake({"shell": False}, ValueError, "shell must be True"),
        Mistake({"bufsize": 1}, ValueError, "bufsize must be 0"),
        Mistake({"text": True}, ValueError, "text must be False"),
        Mistake({"encoding": "ascii"}, ValueError, "encoding must be None"),
        Mistake({"errors": "strict"}, ValueError, "errors must be None"),
    ],
}

#: The other arguments that a function needs.
NEEDED: dict[str, dict[str, Any]] = {
    "start_tls": {"protocol": OBJECT},
    "subprocess_exec": {"program": "true"},
    "subprocess_shell": {"cmd": "true"},
}


#: Functions that take a protocol.
NO_FACTORY = {"start_tls", "sendfile"}


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """Return the options of two mistakes at a time, or `None` if they cannot be made together."""
    options = dict(first)
    for name, value in second.items():
        known = options.setdefault(name, value)
        if known is ANY and value is not ABSENT:
            options[name] = value
        elif known is not value and (value is not ANY or known is ABSENT):
            return None
    return options


def together(function: str, first: Mistake) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the options of a mistake alone and with each later one, and whether asyncio is no oracle for them."""
    yield first.options, first.only_ours
    mistakes = TABLES[function]
    for second in mistakes[mistakes.index(first) + 1 :]:
        options = merged(first.options, second.options)
        if options is not None:
            yield options, first.only_ours or second.only_ours


@asynccontextmanager
async def made(group: Any, options: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Return the options, with new objects for the placeholders."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    families = {UNIX_STREAM: AF_UNIX, SEQPACKET: AF_UNIX}
    types = {DATAGRAM: socket.SOCK_DGRAM, SEQPACKET: socket.SOCK_SEQPACKET}
    async with AsyncExitStack() as stack:
        result: dict[str, Any] = {}
        for name, value in options.items():
            if value is ABSENT:
                continue
            if not isinstance(value, Kind):
                result[name] = value
            elif value is CONTEXT:
                result[name] = context
            elif value is ENDPOINT:
                result[name], protocol = await group.create_datagram_endpoint(Endpoint, local_addr=(HOST, 0))
                stack.push_async_callback(ended, result[name], protocol)
            elif name == "transport":
                result[name], protocol, _ = await stack.enter_async_context(connected(group))
                stack.push_async_callback(ended, result[name], protocol)
                if value is CLOSED:
                    result[name].close()
            elif name == "file":
                result[name] = stack.enter_context(open(__file__, "r" if value is TEXT else "rb"))
            elif value is TLS:
                result[name] = stack.enter_context(context.wrap_socket(socket.socket()))
            else:
                family, kind = families.get(value, socket.AF_INET), types.get(value, socket.SOCK_STREAM)
                result[name] = stack.enter_context(socket.socket(family, kind))
        yield result


async def ended(transport: Any, protocol: Any) -> None:
    transport.abort()
    await until(lambda: protocol.lost)


def need_unix(options: dict[str, Any]) -> bool:
    return any(value is each for value in options.values() for each in (UNIX_STREAM, SEQPACKET, AF_UNIX))


def marks(function: str, mistake: Mistake) -> list[pytest.MarkDecorator]:
    found = []
    if "unix" in function or need_unix(mistake.options):
        found.append(needs_unix)
    if "subprocess" in function:
        found.append(needs_pipes)
    return found


@pytest.mark.parametrize(
    ("function", "mistake"),
    [
        pytest.param(
            function,
            mistake,
            id=f"{function}-{'-'.join(f'{k}={v!r}' for k, v in mistake.options.items())}",
            marks=marks(function, mistake),
        )
        for function, mistakes in TABLES.items()
        for mistake in mistakes
    ],
)
async def test_s12_the_first_mistake_is_raised(stack: Stack, function: str, mistake: Mistake) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        for options, only_ours in together(function, mistake):
            if (stack.is_oracle and only_ours) or (AF_UNIX == socket.AF_UNSPEC and need_unix(options)):
                continue
            async with made(group, options) as made_options:
                keywords = {**NEEDED.get(function, {}), **made_options}
                positional = [] if function in NO_FACTORY else [Recorder]
                positional += [keywords.pop(name) for name in ("program", "cmd") if name in keywords]
                given = [each for each in keywords.values() if isinstance(each, socket.socket)]
                numbers = [sock.fileno() for sock in given]
                before = open_descriptors()
                with pytest.raises(mistake.error, match=mistake.message) as caught:
                    await getattr(group, function)(*positional, **keywords)
                assert type(caught.value) is mistake.error, options
                # Nothing has been done: the caller still owns its objects, and nothing else is open.
                assert [sock.fileno() for sock in given] == numbers, options
                assert open_descriptors() == before, options
                assert contexts == []


def test_mistakes_are_tested_in_pairs() -> None:
    """Otherwise nothing would test the order of the tables."""
    counts = {name: sum(len(list(together(name, each))) for each in table) for name, table in TABLES.items()}
    assert all(counts[name] > len(table) for name, table in TABLES.items()), counts
    assert sum(counts.values()) > 300
