# pyright: reportMissingImports=false, reportUnknownParameterType=false
"""An aiohttp client in a trio program: several pages at a time, each with a time-out of its own.

    pip install aiohttp
    python aiohttp_client.py --backend trio https://example.org https://trio.readthedocs.io

The tasks and the time-outs are the backend's. Each task calls aiohttp with `to_asyncio.run`. A request that takes too
long is cancelled, and the session is closed at the end.
"""

from __future__ import annotations

import aiohttp
import anyio
from _backend import make_parser, run

from transports_anyio import open_event_loop, to_asyncio


async def fetch(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    """In asyncio code, as aiohttp's documentation has it."""
    async with session.get(url) as response:
        return response.status, await response.read()


async def show(session: aiohttp.ClientSession, url: str, patience: float) -> None:
    """In backend code: on trio in a trio task."""
    with anyio.move_on_after(patience):
        try:
            status, body = await to_asyncio.run(fetch, session, url)
        except aiohttp.ClientError as exc:
            print(f"{url}: {type(exc).__name__}")
        else:
            print(f"{url}: {status}, {len(body)} bytes")
        return
    print(f"{url}: nothing within {patience} s")


async def main(urls: list[str], patience: float) -> None:
    async with open_event_loop():
        # The session looks for the running event loop, so it is made and closed in asyncio code.
        new_session = to_asyncio.run_sync(aiohttp.ClientSession)
        async with (
            to_asyncio.wrap_async_context_manager(new_session) as session,
            anyio.create_task_group() as tasks,
        ):
            for url in urls:
                tasks.start_soon(show, session, url, patience)


if __name__ == "__main__":
    parser = make_parser("Fetch pages with aiohttp, all at a time.")
    parser.add_argument("urls", nargs="+", metavar="URL", help="what to fetch")
    parser.add_argument("--patience", type=float, default=5, help="seconds for each page")
    arguments = parser.parse_args()
    run(arguments.backend, main, arguments.urls, arguments.patience)
