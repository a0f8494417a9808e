# pyright: reportMissingImports=false
"""A pool of PostgreSQL connections by asyncpg, shared by the tasks of a trio program.

    pip install asyncpg
    python asyncpg_pool.py --backend trio postgresql://user@127.0.0.1/database

Ten tasks of the backend ask at once. One query is given up when its time is over. A transaction runs as asyncio code.
"""

from __future__ import annotations

from typing import Any

import anyio
import asyncpg
from _backend import make_parser, run

from transports_anyio import open_event_loop, to_asyncio


async def transfer(pool: Any) -> int:
    """In asyncio code, as asyncpg's documentation has it: what belongs together crosses once."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("create temporary table amounts (amount int) on commit drop")
        await connection.executemany("insert into amounts values ($1)", [(1,), (2,), (39,)])
        total: int = await connection.fetchval("select sum(amount) from amounts")
        return total


async def main(dsn: str) -> None:
    squares: list[int] = []

    async def square(number: int) -> None:
        squares.append(await to_asyncio.run(pool.fetchval, "select $1::int * $1::int", number))

    async with open_event_loop():
        # The pool looks for the running event loop, so it is made, entered and left in asyncio code.
        new_pool = to_asyncio.run_sync(asyncpg.create_pool, dsn)
        async with to_asyncio.wrap_async_context_manager(new_pool) as pool:
            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(square, number)
            print("squares", sorted(squares))
            with anyio.move_on_after(0.1) as scope:
                await to_asyncio.run(pool.execute, "select pg_sleep(60)")
            print("gave up" if scope.cancelled_caught else "slept for a minute")
            print("total", await to_asyncio.run(transfer, pool))


if __name__ == "__main__":
    parser = make_parser("Ask a PostgreSQL database with asyncpg.")
    parser.add_argument("dsn", metavar="DSN", help="the database, as postgresql://USER@HOST:PORT/NAME")
    arguments = parser.parse_args()
    run(arguments.backend, main, arguments.dsn)
