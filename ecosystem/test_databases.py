"""Redis and PostgreSQL: redis, asyncpg and psycopg with real servers, and their command-line clients beside them."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import asyncpg
import psycopg
import pytest
import redis.asyncio
import redis.exceptions
from peers import HOST, PostgreSQL, Redis, Tls
from psycopg.rows import dict_row


def client(server: Redis, **options: Any) -> redis.asyncio.Redis:
    return redis.asyncio.Redis(host=HOST, port=server.port, decode_responses=True, **options)


async def test_redis(redis_server: Redis) -> None:
    async with client(redis_server) as connection:
        await connection.flushall()
        await connection.set("key", "value" * 100_000)
        assert len(await asyncio.to_thread(redis_server.cli, "GET", "key")) == 500_000
        await asyncio.to_thread(redis_server.cli, "SET", "from-cli", "hello")
        assert await connection.get("from-cli") == "hello"

        async def count() -> None:
            for _ in range(20):
                await connection.incr("counter")

        await asyncio.gather(*(count() for _ in range(20)))
        assert await connection.get("counter") == "400"
        async with connection.pipeline(transaction=True) as pipeline:
            for number in range(1000):
                pipeline.rpush("list", number)
            assert await pipeline.execute() == list(range(1, 1001))
        assert await connection.lrange("list", 0, -1) == [str(number) for number in range(1000)]


async def test_redis_by_unix_socket(redis_server: Redis) -> None:
    async with redis.asyncio.Redis(unix_socket_path=redis_server.path) as connection:
        assert await connection.ping()
        await connection.set("big", bytes(1_000_000))
        assert await connection.get("big") == bytes(1_000_000)


async def test_redis_publishes(redis_server: Redis) -> None:
    async with client(redis_server) as connection, connection.pubsub() as subscription:
        await subscription.subscribe("news")
        messages = subscription.listen()
        assert (await anext(messages))["type"] == "subscribe"
        assert await asyncio.to_thread(redis_server.cli, "PUBLISH", "news", "from cli") == "1"
        assert (await anext(messages))["data"] == "from cli"
        for number in range(100):
            await connection.publish("news", number)
        assert [(await anext(messages))["data"] for _ in range(100)] == [str(number) for number in range(100)]
        assert await subscription.get_message(timeout=0.02) is None


async def test_redis_time_outs_and_cancellation(redis_server: Redis) -> None:
    async with client(redis_server) as connection:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connection.blpop("nothing-comes")
        waiting = asyncio.create_task(connection.blpop("nothing-comes"))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # Neither left an answer for others to read.
        assert await connection.echo("still here") == "still here"
    async with client(redis_server, socket_timeout=0.05, retry=None) as impatient:
        with pytest.raises(redis.exceptions.TimeoutError):
            await impatient.blpop("nothing-comes")
    async with client(redis_server) as connection:
        number = await connection.client_id()
        await asyncio.to_thread(redis_server.cli, "CLIENT", "KILL", "ID", str(number))
        assert await connection.ping()


async def test_asyncpg(postgresql: PostgreSQL) -> None:
    connection = await asyncpg.connect(postgresql.dsn)
    try:
        assert await asyncio.to_thread(
            postgresql.psql, "select count(*) from pg_stat_activity where usename = 'tester'"
        )
        assert await connection.fetchval("select $1::int + 1", 41) == 42
        rows = await connection.fetch("select n, repeat('x', n) as text from generate_series(1, 2000) n")
        assert [(row["n"], len(row["text"])) for row in rows] == [(n, n) for n in range(1, 2001)]
        await connection.execute("create temporary table item (id int primary key, data bytea)")
        async with connection.transaction():
            await connection.copy_records_to_table("item", records=[(n, bytes(n)) for n in range(1000)])
        with pytest.raises(asyncpg.UniqueViolationError):
            async with connection.transaction():
                await connection.execute("insert into item values (5000), (1)")
        assert await connection.fetchval("select count(*) from item") == 1000
        async with connection.transaction():
            seen = [row["id"] async for row in connection.cursor("select id from item order by id", prefetch=10)]
        assert seen == list(range(1000))
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.fetchval("select 1/0")
    finally:
        await connection.close()


@pytest.mark.parametrize("how", ["plain", "TLS"])
async def test_an_asyncpg_pool(postgresql: PostgreSQL, tls: Tls, how: str) -> None:
    context: Any = tls.client if how == "TLS" else False
    async with asyncpg.create_pool(postgresql.dsn, ssl=context, min_size=2, max_size=4) as pool:
        encrypted = await pool.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
        assert encrypted == (how == "TLS")
        answers = await asyncio.gather(*(pool.fetchval("select $1::int * 2", number) for number in range(200)))
        assert answers == [number * 2 for number in range(200)]
        # Bigger than any buffer.
        assert len(await pool.fetchval("select repeat('x', 5000000)")) == 5_000_000


async def test_asyncpg_refuses_a_certificate(postgresql: PostgreSQL) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncpg.connect(postgresql.dsn, ssl=ssl.create_default_context())


async def test_asyncpg_time_outs_and_cancellation(postgresql: PostgreSQL) -> None:
    async with asyncpg.create_pool(postgresql.dsn, min_size=1, max_size=1) as pool:
        with pytest.raises(TimeoutError):
            await pool.execute("select pg_sleep(30)", timeout=0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pool.execute("select pg_sleep(30)")
        query = asyncio.create_task(pool.execute("select pg_sleep(30)"))
        await asyncio.sleep(0.05)
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query
        # The server was asked to stop each: the one connection is free again.
        assert await pool.fetchval("select 1") == 1
        async with pool.acquire() as connection:
            number = connection.get_server_pid()
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _: lost.set())
            await asyncio.to_thread(postgresql.psql, f"select pg_terminate_backend({number})")
            await lost.wait()
            with pytest.raises(asyncpg.InterfaceError):
                await connection.fetchval("select 1")
        assert await pool.fetchval("select 2") == 2


async def test_asyncpg_listens(postgresql: PostgreSQL) -> None:
    came: asyncio.Queue[str] = asyncio.Queue()
    connection = await asyncpg.connect(postgresql.dsn)
    await connection.add_listener("news", lambda *args: came.put_nowait(args[3]))
    await asyncio.to_thread(postgresql.psql, "notify news, 'from psql'")
    assert await came.get() == "from psql"
    await connection.close()


async def test_psycopg(postgresql: PostgreSQL) -> None:
    """libpq has the connection; psycopg waits for its descriptor by add_reader and add_writer."""
    async with await psycopg.AsyncConnection.connect(postgresql.dsn, autocommit=True) as connection:
        cursor = connection.cursor(row_factory=dict_row)
        await cursor.execute("select n, repeat('x', n) as text from generate_series(1, 2000) n")
        assert [(row["n"], len(row["text"])) async for row in cursor] == [(n, n) for n in range(1, 2001)]
        await connection.execute("create temporary table item (id int, data text)")
        async with cursor.copy("copy item from stdin") as copy:
            for number in range(10_000):
                await copy.write_row((number, "y" * 100))
        await cursor.execute("select count(*) as count, sum(length(data)) as size from item")
        assert await cursor.fetchone() == {"count": 10_000, "size": 1_000_000}
        async with connection.pipeline():
            for number in range(100):
                await cursor.execute("insert into item values (%s, 'z')", (number,))
        query = asyncio.create_task(connection.execute("select pg_sleep(30)"))
        await asyncio.sleep(0.05)
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query
        with pytest.raises(psycopg.errors.DivisionByZero):
            await connection.execute("select 1/0")
        await connection.execute("listen news")
        notices = connection.notifies()
        await asyncio.to_thread(postgresql.psql, "notify news, 'from psql'")
        assert (await anext(notices)).payload == "from psql"
        await notices.aclose()


async def test_psycopg_many_at_once(postgresql: PostgreSQL) -> None:
    async def one(number: int) -> int:
        async with await psycopg.AsyncConnection.connect(postgresql.dsn) as connection:
            cursor = await connection.execute("select %s::int + pg_backend_pid() * 0", (number,))
            row = await cursor.fetchone()
            assert row is not None
            return int(row[0])

    assert await asyncio.gather(*map(one, range(20))) == list(range(20))
