"""Child processes: `subprocess_exec`, `subprocess_shell` and `connect_process`."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
from anyio.abc import Process

from .._callbacks import CallbackContext
from .._channels._abc import Channel
from .._channels._anyio_stream import AnyIOStreamChannel, DiscardingChannel
from .._channels._child import AnyIOChild, PopenChild
from .._channels._pipe import ChildPipeChannel, require_pipes
from .._transports._pipe import ReadPipeTransport, WritePipeTransport
from .._transports._stream import StreamTransport
from .._transports._subprocess import PipeProtocol, SubprocessTransport
from ._base import Endpoints, ProtocolT
from ._programs import start_program

if TYPE_CHECKING:
    import os

    Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: asyncio takes these for the sake of `subprocess.Popen`'s signature, with one value only: pipes carry bytes.
ONLY_VALUES: dict[str, Any] = {
    "universal_newlines": False,
    "shell": False,  # Or true, for `subprocess_shell`.
    "bufsize": 0,
    "text": False,
    "encoding": None,
    "errors": None,
}


def check_options(options: dict[str, Any], *, shell: bool) -> None:
    """Raise asyncio's `ValueError` for an option that it refuses, and take it out if it has the right value."""
    if not options:
        return
    for name, only in ONLY_VALUES.items():
        if name not in options:
            continue
        value = shell if name == "shell" else only
        given = options.pop(name)
        # What is true or false may be so by any object; a size is 0.
        wrong = bool(given) != value if isinstance(value, bool) else given != value
        if wrong:
            raise ValueError(f"{name} must be {value}")


class ProcessEndpoints(Endpoints):
    """`subprocess_exec`, `subprocess_shell` and `connect_process`."""

    async def subprocess_exec(
        self,
        protocol_factory: Callable[[], ProtocolT],
        program: Argument,
        *args: Argument,
        stdin: Any = subprocess.PIPE,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        **options: Any,
    ) -> tuple[asyncio.SubprocessTransport, ProtocolT]:
        """Run `program` with `args` as a child process and return `(transport, protocol)`.

        `stdin`, `stdout` and `stderr` are each `PIPE`, `DEVNULL`, a file or descriptor, or `None` for ours; `stderr`
        may be `STDOUT`. `options` are those of `subprocess.Popen`. `connection_made` runs before this returns. A child
        that still runs when the block of the group is left is killed.

        On Linux a pipe that carries much is enlarged to 512 KiB, 64 of them at a time; one whose size was chosen
        (`pipesize`) keeps it.

        Raises `RuntimeError` when the group is not open, `OSError` when the program cannot be run (it does not exist,
        say), `ValueError` for an option that makes no sense for pipes of bytes, `NotImplementedError` on Windows, and
        whatever `protocol_factory` and `Popen` raise; nothing is left behind then.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.subprocess_exec
        """
        check_options(options, shell=False)
        return await self._spawn(
            protocol_factory, (program, *args), stdin=stdin, stdout=stdout, stderr=stderr, **options
        )

    async def subprocess_shell(
        self,
        protocol_factory: Callable[[], ProtocolT],
        cmd: str | bytes,
        *,
        stdin: Any = subprocess.PIPE,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        **options: Any,
    ) -> tuple[asyncio.SubprocessTransport, ProtocolT]:
        """Run `cmd` in the platform's shell and return `(transport, protocol)`.

        What comes from elsewhere has to be quoted, with `shlex.quote`. `stdin`, `stdout`, `stderr` and `options` are as
        for `subprocess_exec`.

        Raises as `subprocess_exec` does, whatever `protocol_factory` raises included, and `ValueError` when `cmd` is no
        string. A command that does not exist is the shell's to report.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.subprocess_shell
        """
        if not isinstance(cmd, (str, bytes)):
            raise ValueError("cmd must be a string")  # noqa: TRY004  # as asyncio
        check_options(options, shell=True)
        return await self._spawn(
            protocol_factory, cmd, shell=True, stdin=stdin, stdout=stdout, stderr=stderr, **options
        )

    async def connect_process(
        self, protocol_factory: Callable[[], ProtocolT], process: Process
    ) -> tuple[asyncio.SubprocessTransport, ProtocolT]:
        """Give an AnyIO process a protocol and return `(transport, protocol)`.

        The transport owns the process and its streams from now on, and waits for its end. The extra info `subprocess`
        is `process`. One that has ended already is no error of the call.

        On asyncio and uvloop AnyIO closes the descriptors of the outputs together, with the process: after a transport
        of one output is closed, what the process still writes there is received and dropped, and it gets no `SIGPIPE`.
        Input that a grandchild never reads keeps its descriptor open there, too, until the grandchild has gone; and
        AnyIO of before 4.15 leaves the descriptors of outputs that a grandchild keeps open to
        the garbage collector.

        Raises `RuntimeError` when the group is not open and when another transport uses the process or one of its
        streams, `TypeError` for a process of another kind, and whatever `protocol_factory` raises; the process is then
        left to the caller.

        Source: https://anyio.readthedocs.io/en/stable/subprocesses.html
        """
        if not isinstance(process, Process):
            raise TypeError(
                f"an AnyIO process was expected, got {process!r}: make it with anyio.open_process(), or let "
                "subprocess_exec() start the program"
            )
        await anyio.lowlevel.checkpoint()
        poller = self._core.check_open()
        streams = {fd: s for fd, s in enumerate((process.stdin, process.stdout, process.stderr)) if s is not None}
        self._require_unused(process, *streams.values())
        callback_context = self._core.callback_context()
        protocol = callback_context.make_protocol(protocol_factory)
        clock = poller.time
        output = AnyIOStreamChannel if poller.loop is None else DiscardingChannel
        channels = {fd: (output if fd else AnyIOStreamChannel)(stream, clock) for fd, stream in streams.items()}
        return self._start_child(callback_context, protocol, AnyIOChild(process, clock), channels)

    async def _spawn(
        self, protocol_factory: Callable[[], ProtocolT], args: Any, **options: Any
    ) -> tuple[asyncio.SubprocessTransport, ProtocolT]:
        require_pipes()
        await anyio.lowlevel.checkpoint()
        poller = self._core.check_open()
        # From here on nothing waits, so nothing can be cancelled half-way.
        callback_context = self._core.callback_context()
        protocol = callback_context.make_protocol(protocol_factory)
        popen = start_program(args, options)
        child = PopenChild(poller, popen, self._core.call, self._core.start_internal_task)
        channels: dict[int, Channel] = {}
        try:
            for fd, pipe in enumerate((popen.stdin, popen.stdout, popen.stderr)):
                if pipe is not None:
                    channels[fd] = ChildPipeChannel(poller, pipe, writing=fd == 0)
        except BaseException:
            child.kill_and_reap()
            for channel in channels.values():
                channel.close(aborted=True)
            for pipe in filter(None, (popen.stdin, popen.stdout, popen.stderr)):
                pipe.close()
            await child.reaped()
            raise
        try:
            return self._start_child(callback_context, protocol, child, channels)
        except BaseException:
            await child.reaped()
            raise

    def _start_child(
        self,
        callback_context: CallbackContext,
        protocol: ProtocolT,
        child: PopenChild | AnyIOChild,
        channels: Mapping[int, Channel],
    ) -> tuple[asyncio.SubprocessTransport, ProtocolT]:
        transport = SubprocessTransport(callback_context, child, protocol, self._core.remove_resource)
        self._core.add_resource(transport)
        try:
            pipes: dict[int, StreamTransport] = {}
            for fd, channel in channels.items():
                kind = ReadPipeTransport if fd else WritePipeTransport
                pipes[fd] = kind(callback_context, channel, PipeProtocol(transport, fd), transport.pipe_gone)
            transport.start(pipes)
        except BaseException:
            transport.abort()
            raise
        finally:  # The child is the group's, even if `connection_made` raised what leaves through the group.
            if child.needs_task:
                self._run_for(child.process, child.run, f"process {child.pid}")
            for channel in channels.values():
                if isinstance(channel, AnyIOStreamChannel):
                    self._run_for(channel.stream, channel.run, f"a pipe of {child.process!r}")
        return transport, protocol
