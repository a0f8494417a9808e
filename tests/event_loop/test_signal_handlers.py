from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
from typing import Any

import pytest

from transports_anyio import from_asyncio

#: There these methods are uvloop's own, which differ in details.
LEFT_OUT = ["uvloop"]

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals")

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")


@pytest.fixture(autouse=True)
def every_handler_is_put_back():
    before = {sig: signal.getsignal(sig) for sig in signal.valid_signals()}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    yield
    assert {sig: signal.getsignal(sig) for sig in signal.valid_signals()} == before
    assert signal.set_wakeup_fd(wakeup) == wakeup


def test_a_handler_is_a_callback_of_the_event_loop(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        called = loop.create_future()
        token = variable.set("when added")

        def callback(*args: object) -> None:
            assert asyncio.get_running_loop() is loop
            called.set_result((args, variable.get()))

        loop.add_signal_handler(signal.SIGUSR1, callback, 1, "two")
        variable.reset(token)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not called.done()
        assert await called == ((1, "two"), "when added")
        assert loop.remove_signal_handler(signal.SIGUSR1)
        assert not loop.remove_signal_handler(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL

    run(main)


@pytest.mark.differs(
    "`signal.set_wakeup_fd`",
    asyncio="set by `add_signal_handler`",
    here="not changed",
    why="it is trio's, which wakes up for signals by itself",
)
def test_a_signal_wakes_an_idle_event_loop(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, called.set)
        for _ in range(20):
            timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            await called.wait()
            called.clear()
            timer.join()
        loop.remove_signal_handler(signal.SIGUSR1)

    run(main)


def test_many_signals(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls = []
        loop.add_signal_handler(signal.SIGUSR1, calls.append, 1)
        loop.add_signal_handler(signal.SIGUSR2, calls.append, 2)
        for _ in range(50):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.sleep(0)
        while len(calls) < 100:
            await asyncio.sleep(0.001)
        assert sorted(calls) == [1] * 50 + [2] * 50
        loop.remove_signal_handler(signal.SIGUSR1)
        loop.remove_signal_handler(signal.SIGUSR2)

    run(main)


def test_a_second_handler_takes_the_place_of_the_first(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls = []
        called = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, calls.append, "first")
        loop.add_signal_handler(signal.SIGUSR1, called.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        await called.wait()
        assert calls == []
        assert loop.remove_signal_handler(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL

    run(main)


def test_ctrl_c_may_have_a_handler(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, called.set)
        os.kill(os.getpid(), signal.SIGINT)
        await called.wait()
        assert loop.remove_signal_handler(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) not in (signal.SIG_DFL, signal.SIG_IGN)

    run(main)


def test_a_failing_handler_is_reported(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reported = loop.create_future()
        loop.set_exception_handler(lambda _, context: reported.set_result(context))
        loop.add_signal_handler(signal.SIGUSR1, lambda: 1 / 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        context = await reported
        assert isinstance(context["exception"], ZeroDivisionError)
        loop.remove_signal_handler(signal.SIGUSR1)

    run(main)


def test_handlers_are_removed_at_the_end(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, int)
        loop.add_signal_handler(signal.SIGUSR2, int)

    run(main)


@pytest.mark.differs(
    "`remove_signal_handler`, and the end of the event loop",
    asyncio="set the default handler",
    here="restore the previous handler, unless another was set since",
    why="trio has a handler for Ctrl-C, and other libraries have theirs",
)
@pytest.mark.parametrize("previous", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "function"])
def test_the_handler_before_is_put_back(run, previous):
    if not run.is_ours:
        pytest.skip("asyncio's own set the default handler")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, int)
        loop.add_signal_handler(signal.SIGUSR1, str)
        loop.remove_signal_handler(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == previous

    before = signal.signal(signal.SIGUSR1, previous)
    try:
        run(main)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.differs("`remove_signal_handler`, and the end of the event loop")
def test_a_handler_that_something_else_has_set_stays(run):
    if not run.is_ours:
        pytest.skip("asyncio's own set the default handler")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, int)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert loop.remove_signal_handler(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    run(main)


async def coroutine_function() -> None: ...


def test_what_cannot_be_handled(run):
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        for sig in (signal.SIGKILL, signal.SIGSTOP):
            before = signal.getsignal(sig)
            with pytest.raises(RuntimeError, match="cannot be caught"):
                loop.add_signal_handler(sig, int)
            assert signal.getsignal(sig) == before
            assert not loop.remove_signal_handler(sig)
        for sig in ("SIGUSR1", None, 10.0):
            with pytest.raises(TypeError, match="sig must be an int"):
                loop.add_signal_handler(sig, int)
            with pytest.raises(TypeError, match="sig must be an int"):
                loop.remove_signal_handler(sig)
        for sig in (-1, 0, 1000):
            with pytest.raises(ValueError, match="invalid signal number"):
                loop.add_signal_handler(sig, int)
            with pytest.raises(ValueError, match="invalid signal number"):
                loop.remove_signal_handler(sig)
        with pytest.raises(TypeError, match="coroutines cannot be used with add_signal_handler"):
            loop.add_signal_handler(signal.SIGUSR1, coroutine_function)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL

    run(main)


def test_only_the_main_thread_handles_signals(run):
    errors = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises((RuntimeError, ValueError), match="main thread"):
            loop.add_signal_handler(signal.SIGUSR1, int)
        assert not loop.remove_signal_handler(signal.SIGUSR1)

    def thread() -> None:
        try:
            run(main)
        except BaseException as exc:
            errors.append(exc)

    running = threading.Thread(target=thread)
    running.start()
    running.join()
    if errors:
        raise errors[0]


def test_signals_that_trio_receives_itself(run):
    if run.name != "trio":
        pytest.skip("of trio's")
    import trio

    async def receive() -> int:
        with trio.open_signal_receiver(signal.SIGUSR2) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
            async for sig in signals:
                return sig
        raise AssertionError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, called.set)
        assert await from_asyncio.run(receive) == signal.SIGUSR2
        await called.wait()
        loop.remove_signal_handler(signal.SIGUSR1)

    run(main)
