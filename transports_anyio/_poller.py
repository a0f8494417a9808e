"""The poller: waits for many file descriptors at once.

Holds: the poller, which joins a selector and a driver, and the choice of both.
May know: `anyio`, `asyncio`, `_clock`, `_driver`, `_loop_driver`, `_selector`, `_task_selector`, `_trio`.

The selector reports which file descriptors are ready. The driver waits for that, and calls the scheduler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio

from ._clock import Clock
from ._driver import Driver, TaskDriver
from ._loop_driver import LoopDriver, running
from ._selector import Failed, Registration, Selector, SystemSelector, make_system_selector
from ._task_selector import TaskSelector


class Poller:
    """A selector and the driver that waits for it."""

    def __init__(self, selector: Selector, driver: Driver) -> None:
        self.selector: Selector = selector
        self.driver: Driver = driver
        #: The clock of the backend.
        self.clock: Clock = driver.clock
        #: The registration of each file descriptor.
        self.registrations: dict[int, Registration] = selector.registrations
        #: `Selector.dispatch`, without the cost of another call.
        self.dispatch: Callable[[Failed], int] = selector.dispatch
        #: The running asyncio event loop, for `Server.get_loop`; `None` on trio.
        self.loop: asyncio.AbstractEventLoop | None = None

    def owner(self, fd: int) -> Registration | None:
        """Return the registration of a file descriptor that is in use: one that does not give way."""
        registration = self.registrations.get(fd)
        return None if registration is None or registration.gives_way else registration

    def register(self, registration: Registration) -> None:
        """Reserve the file descriptor for `registration`, until `unregister`."""
        before = self.registrations.get(registration.fd)
        if before is not None and before.gives_way:
            self.unregister(before)
        self.registrations[registration.fd] = registration

    def unregister(self, registration: Registration) -> None:
        """Remove a file descriptor, before it is closed: a copy in a forked child would keep it ready."""
        if registration.interest:
            self.set_interest(registration, 0)
        if self.registrations.get(registration.fd) is registration:
            del self.registrations[registration.fd]

    def set_interest(self, registration: Registration, interest: int) -> None:
        """Wait for the events of `interest`, another mask of `READ`, `WRITE` and `HANGUP` than the present one.

        `read_ready` and `write_ready` are called in every batch, as long as the file descriptor is ready. Raises
        `OSError` when the system watches as many file descriptors as it can.
        """
        self.selector.set_interest(registration, interest)
        if self.selector.always_ready:
            self.driver.wake()  # They never end a wait, so there must be none.

    def close(self) -> None:
        """Release all resources."""
        self.selector.close()
        self.driver.close()


def make_poller() -> Poller:
    """Return the best poller for this platform and the running backend."""
    try:
        # Only with a current task: in trio's guest mode a loop runs, too, but this task belongs to trio.
        loop = asyncio.get_running_loop() if asyncio.current_task() is not None else None
    except RuntimeError:
        loop = None
    if getattr(running, "name", None) == "trio":
        from ._trio import TrioDriver, clock

        # Not AnyIO's clock: this one is the same, whether backend code or asyncio code calls it.
        time = clock()
        return assemble(lambda selector: TrioDriver(selector, time), time)
    poller = assemble(None if loop is None else lambda selector: LoopDriver(selector, loop), anyio.current_time)
    poller.loop = loop
    return poller


def assemble(make_driver: Callable[[SystemSelector], Driver] | None, time: Callable[[], float]) -> Poller:
    """Return a poller with the driver of `make_driver`, or with one that waits in a task, through AnyIO.

    The second one is also for platforms that have no system selector.
    """
    system_selector = make_system_selector()
    selector = system_selector or TaskSelector()
    try:
        if system_selector is None or make_driver is None:
            return Poller(selector, TaskDriver(selector, time))
        return Poller(selector, make_driver(system_selector))
    except BaseException:  # No file descriptors for the driver's socket pair.
        selector.close()
        raise
