# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
"""An ASGI server on trio: uvicorn serves a FastAPI application, whose handlers call functions of trio's.

    pip install fastapi uvicorn
    python asgi_on_trio.py --backend trio &
    curl "http://127.0.0.1:8888/wait?seconds=0.5"

uvicorn and FastAPI know only asyncio. `open_event_loop` gives them an event loop, `from_asyncio.run` leads from a
handler to the backend.
"""

from __future__ import annotations

import anyio
import uvicorn
from _backend import make_parser, run
from fastapi import FastAPI

from transports_anyio import from_asyncio, open_event_loop, to_asyncio


async def wait(seconds: float) -> list[str]:
    """In backend code, on trio in a trio task: here is everything that trio and AnyIO have."""
    finished: list[str] = []

    async def work(name: str) -> None:
        await anyio.sleep(seconds)
        finished.append(name)

    with anyio.move_on_after(1):
        async with anyio.create_task_group() as tasks:
            for name in "abc":
                tasks.start_soon(work, name)
    return sorted(finished)


async def handle_wait(seconds: float = 0) -> dict[str, list[str]]:
    """In asyncio code: FastAPI calls its handlers in asyncio tasks."""
    return {"finished": await from_asyncio.run(wait, seconds)}


app = FastAPI()
app.add_api_route("/wait", handle_wait)


async def main(host: str, port: int) -> None:
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    print(f"listening on http://{host}:{port}")
    async with open_event_loop():
        await to_asyncio.run(server.serve)


if __name__ == "__main__":
    arguments = make_parser("Serve an ASGI application with uvicorn.").parse_args()
    run(arguments.backend, main, arguments.host, arguments.port)
