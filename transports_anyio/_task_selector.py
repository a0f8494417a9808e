"""The selector for platforms whose own selector cannot be waited for (Windows).

Holds: a selector with a waiting task for each file descriptor and direction.
May know: `anyio`, `_selector`, `_waiters`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from ._selector import READ, WRITE, Failed, Registration, Selector, selected
from ._waiters import Waiters


class _Tasks:
    """The tasks that wait for one file descriptor: a mark for each direction that has a task."""

    __slots__ = ("marks", "registration")

    def __init__(self, registration: Registration) -> None:
        self.registration = registration
        self.marks: dict[int, object] = {}


class TaskSelector(Selector):
    """A selector that waits in tasks, through AnyIO.

    A task ends when its file descriptor is ready, and the `dispatch` that reports it starts the next one. Readiness is
    a state, so nothing is missed between the two. A task whose mark has been removed is ignored.
    """

    needs_tasks = True

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, _Tasks] = {}
        self._due: list[tuple[_Tasks, int, object]] = []
        self._due_added = Waiters()
        self._task_group: TaskGroup | None = None

    def set_interest(self, registration: Registration, interest: int) -> None:
        before, registration.interest = registration.interest, interest
        fd = registration.fd
        if self.registrations.get(fd) is not registration:
            return  # The number was reused for another file descriptor.
        tasks = self._waiting.get(fd)
        if tasks is None:
            tasks = self._waiting[fd] = _Tasks(registration)
        if before & ~interest:
            # Wakes every task that waits for the file descriptor, at once: it may be closed and its number reused
            # before a cancelled task would run. The remaining interest gets a new task.
            tasks.marks.clear()
            try:
                self.as_backend(anyio.notify_closing, fd)
            except OSError:  # The user has closed it. The second call wakes the task of the other direction.
                self.as_backend(anyio.notify_closing, fd)
        if interest:
            self._start(tasks)
        else:
            del self._waiting[fd]

    def running(self) -> AbstractAsyncContextManager[object]:
        return self._running()

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        async with anyio.create_task_group() as task_group:
            self._task_group = task_group
            try:
                for tasks in self._waiting.values():
                    self._start(tasks)
                yield
            finally:
                self._task_group = None  # It accepts no more tasks, but interests still change.
                for tasks in self._waiting.values():
                    tasks.marks.clear()  # These tasks end now; `running` may be entered again.

    def _start(self, tasks: _Tasks) -> None:
        if self._task_group is None:
            return  # `running` starts the tasks of earlier registrations.
        for event in (READ, WRITE):
            if event & selected(tasks.registration.interest) and event not in tasks.marks:
                tasks.marks[event] = mark = object()
                self.as_backend(self._task_group.start_soon, self._wait_for, tasks, event, mark)

    async def _wait_for(self, tasks: _Tasks, event: int, mark: object) -> None:
        if tasks.marks.get(event) is not mark:
            return  # The interest changed before this task began; the number may have been reused.
        try:
            await (anyio.wait_readable if event == READ else anyio.wait_writable)(tasks.registration.fd)
        except anyio.ClosedResourceError:
            return  # The interest has changed; `set_interest` has started a task for the remaining one.
        except OSError:
            pass  # The user has closed the file descriptor; the next call that uses it will raise.
        self._due.append((tasks, event, mark))
        self._due_added.notify()

    async def wait(self) -> None:
        # By the list, and not by an event: `dispatch` may be called while this waits, and the wait goes on.
        if self._due:
            await anyio.lowlevel.checkpoint()
        else:
            await self._due_added.wait()

    def dispatch(self, failed: Failed) -> int:
        due, self._due = self._due, []
        for tasks, event, mark in due:
            if tasks.marks.get(event) is mark:
                del tasks.marks[event]
                tasks.registration.notify_or_fail(event, failed)
                if self._waiting.get(tasks.registration.fd) is tasks:
                    self._start(tasks)
        return len(due)

    def close(self) -> None:
        """Do nothing: the tasks have ended with `running`."""
