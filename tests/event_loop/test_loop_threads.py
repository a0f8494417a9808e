from __future__ import annotations

import asyncio
import contextvars
import logging
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

#: There these methods are uvloop's own, which differ in details.
LEFT_OUT = ["uvloop"]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")


def fail() -> None:
    raise ZeroDivisionError


def test_run_in_the_default_executor(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        thread = await loop.run_in_executor(None, threading.current_thread)
        assert thread is not threading.current_thread()
        assert thread.name.startswith("asyncio_")
        assert await loop.run_in_executor(None, divmod, 7, 3) == (2, 1)
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, fail)

    run(main)


def test_run_in_an_executor_of_ones_own(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:
            thread = await loop.run_in_executor(executor, threading.current_thread)
            assert thread.name.startswith("mine")

    run(main)


def test_set_the_default_executor(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="mine"))
        thread = await asyncio.to_thread(threading.current_thread)
        assert thread.name.startswith("mine")
        if sys.version_info < (3, 11) and not run.is_ours:
            return  # asyncio warns of other executors.
        with pytest.raises(TypeError, match="must be ThreadPoolExecutor instance"):
            loop.set_default_executor(object())  # type: ignore[arg-type]

    run(main)


def test_to_thread_takes_the_context_along(run):
    async def main() -> None:
        variable.set("set")
        assert await asyncio.to_thread(variable.get) == "set"

    run(main)


def test_many_threads_at_once(run):
    async def main() -> None:
        assert await asyncio.gather(*(asyncio.to_thread(pow, each, 2) for each in range(200))) == [
            each * each for each in range(200)
        ]

    run(main)


def test_a_cancelled_future_ends_without_its_thread(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun, go_on = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            go_on.wait()

        future = loop.run_in_executor(None, work)
        while not begun.is_set():
            await asyncio.sleep(0.001)
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future
        go_on.set()

    run(main)


async def coroutine_function() -> None: ...


def test_what_cannot_run_in_an_executor_is_an_error_in_debug_mode(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(TypeError, match="coroutines cannot be used with run_in_executor"):
            loop.run_in_executor(None, coroutine_function)
        with pytest.raises(TypeError, match=r"a callable object was expected by run_in_executor\(\)"):
            loop.run_in_executor(None, 5)  # type: ignore[arg-type]

    run(main, debug=True)


def test_shut_the_default_executor_down(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        thread = await loop.run_in_executor(None, threading.current_thread)
        await loop.shutdown_default_executor()
        assert not thread.is_alive()
        with pytest.raises(RuntimeError, match="Executor shutdown has been called"):
            await loop.run_in_executor(None, threading.current_thread)
        with ThreadPoolExecutor(1) as executor:
            assert await loop.run_in_executor(executor, int, "1") == 1
        await loop.shutdown_default_executor()

    run(main)


def test_shut_the_default_executor_down_that_was_never_used(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        await loop.shutdown_default_executor()
        with pytest.raises(RuntimeError, match="Executor shutdown has been called"):
            await asyncio.to_thread(int)

    run(main)


@pytest.mark.differs(
    "`shutdown_default_executor(timeout)`",
    asyncio="since Python 3.12",
    here="on every Python",
    why="one interface",
)
def test_the_shutdown_of_the_default_executor_has_a_time_out(run):
    if sys.version_info < (3, 13) and not run.is_ours:
        pytest.skip("of Python 3.12, where asyncio joins the thread in spite of it")

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        begun, go_on = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            go_on.wait()

        future = loop.run_in_executor(None, work)
        while not begun.is_set():
            await asyncio.sleep(0.001)
        with pytest.warns(RuntimeWarning, match="within 0.01 seconds"):
            await loop.shutdown_default_executor(0.01)
        go_on.set()
        await future

    run(main)


def test_get_address_info(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo("localhost", 80, family=socket.AF_INET, type=socket.SOCK_STREAM)
        assert (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)) in found
        found = await loop.getaddrinfo("127.0.0.1", "http", type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        assert [address for *_, address in found] == [("127.0.0.1", 80)]
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo("no name", 80)

    run(main)


def test_get_name_info(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        flags = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        assert await loop.getnameinfo(("127.0.0.1", 80), flags) == ("127.0.0.1", "80")
        assert (await loop.getnameinfo(("127.0.0.1", 80)))[1] == "http"

    run(main)


def test_address_look_ups_are_logged_in_debug_mode(run, caplog):
    caplog.set_level(logging.DEBUG, logger="asyncio")

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        loop.slow_callback_duration = 0.0
        await loop.getaddrinfo("127.0.0.1", 81)

    run(main, debug=True)
    said = [(record.levelno, record.getMessage()) for record in caplog.records if "address info" in record.getMessage()]
    assert [level for level, _ in said] == [logging.DEBUG, logging.DEBUG, logging.DEBUG, logging.INFO]
    assert said[0][1].startswith("Get address info 127.0.0.1:80, type=")
    assert said[1][1].startswith("Getting address info 127.0.0.1:80, type=")
