"""asyncssh: server and client, with OpenSSH's and with each other."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from peers import HOST, command
from test_asyncio_itself import echo


class Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == ("user", "secret")

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        return True  # Forwarding is allowed.


async def shell(process: asyncssh.SSHServerProcess[str]) -> None:
    if process.command == "fail":
        process.stderr.write("no\n")
        process.exit(3)
        return
    process.stdout.write(f"{process.command}\n")
    async for line in process.stdin:
        process.stdout.write(line.upper())
    process.exit(0)


async def start(directory: Path) -> tuple[Any, int]:
    host, user = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    user.write_private_key(directory / "key")
    (directory / "key").chmod(0o600)
    (directory / "authorized").write_bytes(user.export_public_key())
    server = await asyncssh.listen(
        HOST, 0, server_host_keys=[host], server_factory=Server, process_factory=shell, sftp_factory=True,
        authorized_client_keys=str(directory / "authorized"),
    )  # fmt: skip
    port = server.get_port()
    (directory / "known").write_bytes(f"[{HOST}]:{port} ".encode() + host.export_public_key())
    return server, port


async def test_openssh_with_our_server(tmp_path: Path) -> None:
    server, port = await start(tmp_path)
    options = ["-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "IdentitiesOnly=yes"]
    argv = ["ssh", "-F", "/dev/null", *options, "-i", tmp_path / "key", "-p", str(port), f"user@{HOST}", "say"]
    text = "".join(f"line {number}\n" for number in range(5000))
    assert (await command(*argv, data=text.encode())).decode() == "say\n" + text.upper()
    server.close()
    await server.wait_closed()


async def test_both_sides(tmp_path: Path) -> None:
    server, port = await start(tmp_path)
    known = asyncssh.import_known_hosts((tmp_path / "known").read_text())
    options: dict[str, Any] = {"known_hosts": known, "username": "user", "config": None}
    with pytest.raises(asyncssh.PermissionDenied):
        await asyncssh.connect(HOST, port, password="wrong", client_keys=None, **options)
    async with asyncssh.connect(HOST, port, password="secret", client_keys=None, **options) as connection:
        result = await connection.run("say", input="hello\n")
        assert (result.stdout, result.exit_status) == ("say\nHELLO\n", 0)
        result = await connection.run("fail")
        assert (result.stderr, result.exit_status) == ("no\n", 3)
        results = await asyncio.gather(*(connection.run(f"say {n}", input="x\n" * n) for n in range(1, 21)))
        assert [result.stdout for result in results] == [f"say {n}\n" + "X\n" * n for n in range(1, 21)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.run("say"), 0.05)
    async with (
        asyncssh.connect(HOST, port, client_keys=[str(tmp_path / "key")], **options) as connection,
        connection.start_sftp_client() as sftp,
    ):
        content = os.urandom(1_000_000)
        (tmp_path / "file").write_bytes(content)
        await sftp.put(tmp_path / "file", tmp_path / "there")
        await sftp.get(tmp_path / "there", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        async with (
            await asyncio.start_server(echo, HOST, 0) as behind,
            connection.forward_local_port(HOST, 0, HOST, behind.sockets[0].getsockname()[1]) as listener,
        ):
            reader, writer = await asyncio.open_connection(HOST, listener.get_port())
            writer.write(content)
            assert await reader.readexactly(len(content)) == content
            writer.close()
            await writer.wait_closed()
    server.close()
    await server.wait_closed()
