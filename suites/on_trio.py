"""A pytest plugin: every event loop that asyncio makes is an `EventLoop` of this package, and trio runs in each call.

pytest -p on_trio
"""

from __future__ import annotations

import asyncio
import warnings

from transports_anyio import EventLoop


class EventLoopOnTrio(EventLoop):
    """Does not wait for the first call of backend code: what is tested is the event loop on trio."""

    def _check_may_run(self) -> None:
        super()._check_may_run()
        self._core.ready.appendleft(self._core.need_trio)


class Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return EventLoopOnTrio()


def install() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.set_event_loop_policy(Policy())
    try:
        import blockbuster
    except ImportError:
        return
    # It knows by their names the modules of asyncio that may read, write and send files.
    blockbuster.BlockBuster.activate = lambda self: None


install()
