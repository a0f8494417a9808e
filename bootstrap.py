"""Set everything up and run it, with nothing but Python 3.10 or newer.

    python3 bootstrap.py tour     # one echo protocol on every backend, side by side
    python3 bootstrap.py tests    # the tests on this Python, lint and types: a few minutes
    python3 bootstrap.py checks   # everything else: all Pythons, oldest dependencies, documentation, packages

Makes a virtual environment in `.venv`, installs nox in it and hands over to nox. The exit status is nox's.
Further arguments go to nox: `python3 bootstrap.py tests -- -k flow_control`.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NOX = "nox>=2025.2.9"
OLDEST_PYTHON = (3, 10)

#: What each command asks of nox; without sessions nox runs those that noxfile.py names as default.
COMMANDS = {
    "tour": ["--session", "tour"],
    "tests": [],
    "checks": ["--session", "checks"],
}

NO_PIP = """\
This Python can make no virtual environment with pip in it. Install what is missing and try again:
    Debian, Ubuntu:  apt install python3-venv
    elsewhere:       Python's modules ensurepip and venv, or pip 22.3 or newer"""


def succeeds(*command):
    """Whether the command can be started and returns 0; what it prints is dropped."""
    try:
        finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    return finished.returncode == 0


def make_environment():
    """Make sure that `.venv` has a Python that runs, and return the command that is its pip."""
    python = str(VENV_PYTHON)
    inner_pip = [python, "-m", "pip"]
    # Debian's pip installs into other environments, even where it refuses to install into its own.
    outer_pip = [sys.executable, "-m", "pip", "--python", python]

    if not succeeds(python, "-c", ""):
        print("making the virtual environment", VENV, flush=True)
        # Without the package python3-venv, Debian's venv makes the environment, then fails to put pip in it.
        venv = [sys.executable, "-m", "venv", "--clear"]
        if not succeeds(*venv, str(VENV)) and not succeeds(*venv, "--without-pip", str(VENV)):
            sys.exit(NO_PIP)
    for pip in (inner_pip, outer_pip):
        if succeeds(*pip, "--version"):
            return pip
    sys.exit(NO_PIP)


def main(arguments):
    if sys.version_info < OLDEST_PYTHON:
        sys.exit("transports_anyio needs Python 3.10 or newer; this is " + sys.version.split()[0])
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__)
        return 2
    command, *rest = arguments

    if not succeeds(str(VENV_PYTHON), "-c", "import nox"):
        pip = make_environment()
        print("installing nox", flush=True)
        status = subprocess.call([*pip, "install", "--quiet", NOX])
        if status:
            return status

    # Where the variable CI is set, nox would otherwise fail for a Python that is not there.
    nox = [str(VENV_PYTHON), "-m", "nox", "--no-error-on-missing-interpreters"]
    with subprocess.Popen([*nox, *COMMANDS[command], *rest], cwd=str(ROOT)) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # nox got it too, and tidies up
                continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
