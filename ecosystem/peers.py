"""Real peers: database servers and brokers in processes of their own, command-line clients, certificates."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

__all__ = ["GUARD", "HOST", "PostgreSQL", "Redis", "Tls", "command", "free_port", "program"]

HOST = "127.0.0.1"
#: Seconds after which a wait that should have ended long ago fails. A guard against hanging, not a measurement.
GUARD = 30
#: Debian has the programs of PostgreSQL here, not on the path.
PROGRAMS_OF_DEBIAN = ["/usr/sbin", *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]


def open_descriptors() -> dict[int, str]:
    """Every open descriptor of this process, with what it refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The descriptor that listed the directory.
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def program(name: str) -> str:
    """The path of a program; the test is skipped where it is not installed."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PROGRAMS_OF_DEBIAN]))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def run(*argv: str | Path, data: bytes = b"", **options: Any) -> bytes:
    """What a program prints, once it has ended well."""
    command_line = [program(str(argv[0])), *map(str, argv[1:])]
    finished = subprocess.run(command_line, check=False, input=data, capture_output=True, timeout=GUARD, **options)
    assert finished.returncode == 0, (argv, finished.returncode, finished.stdout, finished.stderr)
    return finished.stdout


async def command(*argv: str | Path, data: bytes = b"") -> bytes:
    """As `run`, in a thread: the peer's work is none of the loop's."""
    return await asyncio.to_thread(run, *argv, data=data)


async def curl(*arguments: str | Path, data: bytes = b"") -> str:
    argv = ["curl", "--silent", "--show-error", "--max-time", str(GUARD), *arguments]
    return (await command(*argv, data=data)).decode()


@dataclass(frozen=True)
class Tls:
    """Certificates of a server on this machine, as contexts and as files."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def issue(cls, authority: trustme.CA, directory: Path) -> Tls:
        issued = authority.issue_cert(HOST, "localhost")
        server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
        issued.configure_cert(server)
        authority.configure_trust(client)
        chain, key, ca = directory / "chain.pem", directory / "key.pem", directory / "ca.pem"
        for number, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(str(chain), append=number > 0)
        issued.private_key_pem.write_to_path(str(key))
        authority.cert_pem.write_to_path(str(ca))
        return cls(server, client, chain, key, ca)


def listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def service(argv: list[str], is_ready: Callable[[], bool], **options: Any) -> Iterator[None]:
    """A server in a process of its own, from when it is ready."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)
        try:
            deadline = time.monotonic() + GUARD
            while not is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise AssertionError(f"{argv[0]} did not start:\n{output.read().decode()}")
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            try:
                process.wait(GUARD)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Redis:
    port: int
    path: str

    def cli(self, *arguments: str) -> str:
        return run("redis-cli", "-p", str(self.port), *arguments).decode().strip()


@contextlib.contextmanager
def redis_server() -> Iterator[Redis]:
    server = program("redis-server")
    with tempfile.TemporaryDirectory() as directory:
        redis = Redis(free_port(), f"{directory}/redis.sock")
        argv = [server, "--bind", HOST, "--port", str(redis.port), "--unixsocket", redis.path, "--dir", directory]
        with service([*argv, "--save", "", "--appendonly", "no"], lambda: listens(redis.port)):
            yield redis


@dataclass(frozen=True)
class PostgreSQL:
    port: int
    directory: str

    @property
    def dsn(self) -> str:
        return f"postgresql://tester@{HOST}:{self.port}/postgres"

    def psql(self, statement: str) -> str:
        return run("psql", "--no-psqlrc", "-At", "-d", self.dsn, "-c", statement).decode().strip()


@contextlib.contextmanager
def postgresql(tls: Tls) -> Iterator[PostgreSQL]:
    """A database in a folder of its own. PostgreSQL refuses to run as root: then as its own user, or as nobody."""
    initdb, postgres = program("initdb"), program("postgres")
    user: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            owner = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        data = Path(directory) / "data"
        for file, name in ((tls.certificate, "server.crt"), (tls.key, "server.key")):
            copy = Path(directory, name)
            copy.write_bytes(file.read_bytes())
            copy.chmod(0o600)
        if user:
            for path in (directory, *Path(directory).iterdir()):
                os.chown(path, user["user"], user["group"])
        run(initdb, "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync", cwd=directory, **user)
        server = PostgreSQL(free_port(), directory)
        settings = {
            "port": server.port, "listen_addresses": HOST, "unix_socket_directories": directory, "fsync": "off",
            "ssl": "on", "ssl_cert_file": f"{directory}/server.crt", "ssl_key_file": f"{directory}/server.key",
        }  # fmt: skip
        argv = [postgres, "-D", str(data), *(each for k, v in settings.items() for each in ("-c", f"{k}={v}"))]

        def is_ready() -> bool:
            # It accepts connections before it answers them.
            command = [program("pg_isready"), "-q", "-h", HOST, "-p", str(server.port)]
            return subprocess.run(command, check=False).returncode == 0

        with service(argv, is_ready, cwd=directory, **user):
            yield server


@contextlib.contextmanager
def mosquitto() -> Iterator[int]:
    """An MQTT broker; its port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "conf").write_text(f"listener {port} {HOST}\nallow_anonymous true\n", encoding="ascii")
        Path(directory).chmod(0o755)  # As root, mosquitto becomes another user.
        with service([program("mosquitto"), "-c", f"{directory}/conf"], lambda: listens(port)):
            yield port
