"""Child processes: `subprocess_exec`, `subprocess_shell` and `connect_process`.

Holds: the endpoint functions.
May know: `_base`, `_callbacks`, `_channels`, `_processes`, `_transports`, `_types`, `abc`, `anyio`, `os`, `subprocess`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
from anyio.abc import Process

from .. import abc
from .._callbacks import CallbackContext
from .._channels._abc import StreamChannel
from .._channels._anyio_stream import AnyIOStreamChannel, DiscardingChannel
from .._processes._anyio import AnyIOChild
from .._processes._popen import PopenChild
from .._processes._programs import start_program
from .._transports._pipe import ReadPipeTransport, WritePipeTransport
from .._transports._stream import StreamTransport
from .._transports._subprocess import PipeProtocol, SubprocessTransport
from .._types import Stdio, SubprocessProtocolT
from ._base import Endpoints, check_open

if TYPE_CHECKING:
    import os

    Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: Options of `subprocess.Popen` that asyncio accepts with one value only, because its pipes carry bytes.
ONLY_VALUES: dict[str, Any] = {
    "universal_newlines": False,
    "shell": False,  # True for `subprocess_shell`.
    "bufsize": 0,
    "text": False,
    "encoding": None,
    "errors": None,
}


def check_options(options: dict[str, Any], *, shell: bool) -> None:
    """Remove the options that have only one value; raise asyncio's `ValueError` if one has another value."""
    if not options:
        return
    for name, only in ONLY_VALUES.items():
        if name not in options:
            continue
        value = shell if name == "shell" else only
        given = options.pop(name)
        # Any true or false object is accepted for a `bool`, but only 0 for a size.
        wrong = bool(given) != value if isinstance(value, bool) else given != value
        if wrong:
            raise ValueError(f"{name} must be {value}")


class ProcessEndpoints(Endpoints):
    """`subprocess_exec`, `subprocess_shell` and `connect_process`."""

    async def subprocess_exec(
        self,
        protocol_factory: Callable[[], SubprocessProtocolT],
        program: Argument,
        *args: Argument,
        stdin: Stdio = subprocess.PIPE,
        stdout: Stdio = subprocess.PIPE,
        stderr: Stdio = subprocess.PIPE,
        **options: Any,
    ) -> tuple[abc.SubprocessTransport, SubprocessProtocolT]:
        """Run `program` with `args` as a child process and return `(transport, protocol)`.

        `connection_made` runs before this returns. If the child still runs when the block of the group is left, it is
        killed.

        - `protocol_factory`: makes the protocol
        - `program`: the name of a program, which is searched along `PATH`, or its path
        - `args`: the arguments of the program
        - `stdin`, `stdout`, `stderr`: `PIPE`, `DEVNULL`, a file or a file descriptor, or `None` to inherit ours;
          `stderr` may be `STDOUT`. On Linux a pipe that carries much data is enlarged to 512 KiB, at most 64 pipes at a
          time, unless its size is given with `pipesize`.
        - `options`: passed to `subprocess.Popen`

        Raises, and leaves no process or pipe:

        - `RuntimeError`: the group is not open
        - `OSError`: the program cannot be run (it does not exist, for example)
        - `ValueError`: an option makes no sense for pipes of bytes
        - whatever `protocol_factory` and `Popen` raise

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.subprocess_exec
        """
        await check_open(self._core, "subprocess_exec", protocol_factory)
        check_options(options, shell=False)
        return await self._spawn(
            protocol_factory, (program, *args), stdin=stdin, stdout=stdout, stderr=stderr, **options
        )

    async def subprocess_shell(
        self,
        protocol_factory: Callable[[], SubprocessProtocolT],
        cmd: str | bytes,
        *,
        stdin: Stdio = subprocess.PIPE,
        stdout: Stdio = subprocess.PIPE,
        stderr: Stdio = subprocess.PIPE,
        **options: Any,
    ) -> tuple[abc.SubprocessTransport, SubprocessProtocolT]:
        """Run `cmd` in the platform's shell and return `(transport, protocol)`.

        Quote untrusted parts of the command with `shlex.quote`. A command that does not exist is not an error here: the
        shell reports it.

        - `protocol_factory`: makes the protocol
        - `cmd`: the command
        - `stdin`, `stdout`, `stderr`, `options`: as for `subprocess_exec`

        Raises what `subprocess_exec` raises, what `protocol_factory` raises included, and `ValueError` if `cmd` is not
        a string.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.subprocess_shell
        """
        await check_open(self._core, "subprocess_shell", protocol_factory)
        if not isinstance(cmd, (str, bytes)):
            raise ValueError("cmd must be a string")  # noqa: TRY004  # as asyncio
        check_options(options, shell=True)
        return await self._spawn(
            protocol_factory, cmd, shell=True, stdin=stdin, stdout=stdout, stderr=stderr, **options
        )

    async def connect_process(
        self, protocol_factory: Callable[[], SubprocessProtocolT], process: Process
    ) -> tuple[abc.SubprocessTransport, SubprocessProtocolT]:
        """Make a protocol for an AnyIO process and return `(transport, protocol)`.

        `connection_made` runs before this returns. A process that has already ended is accepted. The extra info
        `subprocess` is `process`.

        - `protocol_factory`: makes the protocol
        - `process`: the process. The transport owns it and its streams from now on, and waits for its end.

        On asyncio and uvloop AnyIO closes the file descriptors of the outputs together, when the process has ended.
        After the transport of one output is closed, further output is therefore received and dropped, and the process
        gets no `SIGPIPE`. Input that a grandchild never reads keeps its file descriptor open until the grandchild has
        ended. AnyIO before 4.15 leaves it to the garbage collector to close the outputs that a grandchild keeps open.

        Raises, and leaves the process to the caller:

        - `RuntimeError`: the group is not open, or another transport uses the process or one of its streams
        - `TypeError`: `process` is not an AnyIO process
        - whatever `protocol_factory` raises

        Source: https://anyio.readthedocs.io/en/stable/subprocesses.html
        """
        await check_open(self._core, "connect_process", protocol_factory)
        if not isinstance(process, Process):
            raise TypeError(
                f"an AnyIO process was expected, got {process!r}: make it with anyio.open_process(), or let "
                "subprocess_exec() start the program"
            )
        await anyio.lowlevel.checkpoint()
        poller = await check_open(self._core)
        streams = {fd: s for fd, s in enumerate((process.stdin, process.stdout, process.stderr)) if s is not None}
        self._require_unused(process, *streams.values())
        callback_context = self._core.callback_context()
        protocol = callback_context.make_protocol(protocol_factory)
        clock = poller.clock
        output = AnyIOStreamChannel if poller.loop is None else DiscardingChannel
        channels = {fd: (output if fd else AnyIOStreamChannel)(stream, self._core) for fd, stream in streams.items()}
        return self._start_child(callback_context, protocol, AnyIOChild(process, clock), channels)

    async def _spawn(
        self, protocol_factory: Callable[[], SubprocessProtocolT], args: Any, **options: Any
    ) -> tuple[abc.SubprocessTransport, SubprocessProtocolT]:
        await anyio.lowlevel.checkpoint()
        poller = await check_open(self._core)
        # No awaits from here on, so that a cancellation cannot interrupt this.
        callback_context = self._core.callback_context()
        protocol = callback_context.make_protocol(protocol_factory)
        popen = start_program(args, options)
        child = PopenChild(poller, popen, self._core.call, self._core.start_internal_task)
        channels: dict[int, StreamChannel] = {}
        try:
            for fd, pipe in enumerate((popen.stdin, popen.stdout, popen.stderr)):
                if pipe is not None:
                    channels[fd] = self._pipe_channel(pipe, writing=fd == 0, of_child=True)
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
        protocol: SubprocessProtocolT,
        child: PopenChild | AnyIOChild,
        channels: Mapping[int, StreamChannel],
    ) -> tuple[abc.SubprocessTransport, SubprocessProtocolT]:
        transport = SubprocessTransport(callback_context, child, protocol, self._core.remove_resource)
        self._core.add_resource(transport)
        try:
            pipes: dict[int, StreamTransport] = {}
            for fd, channel in channels.items():
                kind = ReadPipeTransport if fd else WritePipeTransport
                pipes[fd] = kind(callback_context, channel, PipeProtocol(transport, fd), transport._pipe_closed)
            transport._start(pipes)
        except BaseException:
            transport._abort()
            raise
        finally:  # The group owns the child, even if `connection_made` raised an exception that ends the group.
            if child.needs_task:
                self._run_for(child.process, child.run, f"process {child.pid}")
            for channel in channels.values():
                if isinstance(channel, AnyIOStreamChannel):
                    self._run_for(channel.stream, channel.run, f"a pipe of {child.process!r}")
        return transport, protocol
