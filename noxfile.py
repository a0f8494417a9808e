"""Everything that is checked: `nox` runs what is quick, `nox -s checks` the rest.

One list of Pythons: the classifiers in pyproject.toml. One list of backends: `BACKENDS`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import tarfile
from pathlib import Path

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml("pyproject.toml")
# Newer releases of nox name free-threaded builds too, of several versions. One is enough.
PYTHONS = [python for python in nox.project.python_versions(PYPROJECT) if not python.endswith("t")]
if any("Free Threading" in classifier for classifier in PYPROJECT["project"]["classifiers"]):
    PYTHONS.append(f"{PYTHONS[-1]}t")
DEPENDENCIES = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

#: The Python that runs nox.
PYTHON_AT_HAND = f"{sys.version_info.major}.{sys.version_info.minor}"
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    PYTHON_AT_HAND += "t"

#: Each backend, and the extra that it needs.
BACKENDS = {"asyncio": None, "uvloop": "uvloop", "trio": "trio"}

#: Whether an installed package is whole: imported from where it was installed, typed, with its licence and version.
LOOK_AT_PACKAGE = """
import sys
from importlib import import_module, metadata
from pathlib import Path

package = import_module("transports_anyio")
import_module("transports_anyio.testing")
home = Path(package.__file__).parent
assert Path(sys.prefix) in home.parents, home
assert (home / "py.typed").exists()
files = {file.name for file in metadata.files("transports-anyio")}
assert "LICENSE" in files, files
assert metadata.version("transports-anyio") == sys.argv[1]
for name in package.__all__:
    getattr(package, name)
"""


def put_pyenv_interpreters_first() -> None:
    """Let nox find the Pythons of pyenv, whichever of them pyenv has selected.

    pyenv puts shims on PATH, which fail for every version that is installed but not selected. The
    interpreters themselves take the place of the shims.
    """
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders = [str(folder) for folder in sorted(root.glob("versions/*/bin"))]
    shims = str(root / "shims")
    if folders:
        path = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder != shims]
        os.environ["PATH"] = os.pathsep.join([*path, *folders])


put_pyenv_interpreters_first()

#: The Pythons that are there. The newest with a GIL measures coverage and runs the tests that take long.
INSTALLED = [python for python in PYTHONS if shutil.which(f"python{python}")]
OLDEST_PYTHON = next(iter(INSTALLED), None)
NEWEST_PYTHON = next((python for python in reversed(INSTALLED) if not python.endswith("t")), None)

#: The newest Python that is there and for which the libraries of `ecosystem` have their wheels.
ECOSYSTEM_PYTHON = next((python for python in ("3.13", "3.12", "3.11") if shutil.which(f"python{python}")), None)

#: For pytest: without the tests that take long.
NOT_EXHAUSTIVE = ("-m", "not exhaustive")

#: The tests of pipes and children, which also run in threads.
PIPES_AND_CHILDREN = ("tests/pipes", "tests/processes", "tests/test_shutdown.py", "tests/event_loop/test_children.py")

#: What plain `nox` runs, in a few minutes, and what it leaves to `nox -s checks`.
QUICK = ["lint", "types", f"tests-{PYTHON_AT_HAND}"]
CHECKS = [
    "docs",
    "package",
    "tour",
    "tests_oldest",
    *(f"tests-{python}" for python in PYTHONS if python not in {PYTHON_AT_HAND, NEWEST_PYTHON}),
    "coverage",
    "ecosystem",
]
nox.options.sessions = QUICK


def group(*names: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, *names)


def oldest(requirements: list[str]) -> list[str]:
    """The oldest releases that these requirements allow, as requirements."""
    pinned = []
    for requirement in map(Requirement, requirements):
        (lowest,) = (each.version for each in requirement.specifier if each.operator == ">=")
        marker = f"; {requirement.marker}" if requirement.marker else ""
        pinned.append(f"{requirement.name}=={lowest}{marker}")
    return pinned


def ask(session: nox.Session, program: str, *arguments: str) -> str:
    """What a program prints that the session's Python runs."""
    answer = session.run("python", "-c", program, *arguments, silent=True, log=False)
    return str(answer or "").strip()


def install_with_backends(session: nox.Session, *requirements: str) -> list[str]:
    """Install the package with every backend that can be had here, and return their names."""
    session.install("--editable", ".", *requirements)
    for extra in filter(None, BACKENDS.values()):
        try:
            # Never built from source: that takes a compiler, and minutes.
            session.install(f"--only-binary={extra}", *EXTRAS[extra])
        except CommandFailed:
            # A Python that is still to be released may have to wait for its wheels.
            if ask(session, "import sys; print(sys.version_info.releaselevel)") == "final":
                raise
    find = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
    there = ask(session, find, *filter(None, BACKENDS.values())).split()
    for backend, extra in BACKENDS.items():
        if extra and extra not in there:
            session.warn(f"{backend} is not available for this Python: skipped")
    return [backend for backend, extra in BACKENDS.items() if extra is None or extra in there]


def run_tests(session: nox.Session, backends: list[str], *pytest: str) -> None:
    """Run the tests, each backend in processes of its own; a failing one does not stop the others.

    Tests that do not depend on the backend run with the first one only.
    """
    # Keep bytecode even where the environment forbids it, as images of containers often do. Otherwise each program that
    # a test starts is compiled again, and so are the tests for each backend.
    bytecode = Path(session.virtualenv.location).resolve() / "bytecode"
    env = {"PYTHONDONTWRITEBYTECODE": None, "PYTHONPYCACHEPREFIX": str(bytecode)}
    if any(argument.startswith("--backend") for argument in session.posargs):
        session.run("pytest", *pytest, *session.posargs, env=env)
        return
    failed = []
    for backend in backends:
        session.log(f"tests on {backend}")
        once = [] if backend == backends[0] else ["--on-backends-only"]
        chosen = ["--numprocesses=auto", "--backend", backend, *once, *pytest, *session.posargs]
        # 5: all that was asked for has run already.
        codes = [0, 5] if once else [0]
        try:
            session.run("pytest", *chosen, env=env, success_codes=codes)
        except CommandFailed:
            failed.append(backend)
    if failed:
        session.error(f"tests failed on {', '.join(failed)}")


@nox.session(python=list(dict.fromkeys([*PYTHONS, PYTHON_AT_HAND])))
def tests(session: nox.Session) -> None:
    """Run the tests on every backend, without those that take long unless arguments ask for them."""
    backends = install_with_backends(session, *group("test"))
    run_tests(session, backends, *(() if session.posargs else NOT_EXHAUSTIVE))


@nox.session(python=NEWEST_PYTHON)
def coverage(session: nox.Session) -> None:
    """Run all tests, those that take long included, on every backend, and measure coverage."""
    backends = install_with_backends(session, *group("test"))
    session.run("coverage", "erase")
    # All backends together are to be covered, not each one.
    measured = ("--cov", "--cov-append", "--cov-report=", "--cov-fail-under=0")
    run_tests(session, backends, *measured)
    if not session.posargs:
        # As on Windows, where pipes and children cannot be polled.
        run_tests(session, backends, *measured, "--descriptors", "threads", *NOT_EXHAUSTIVE, *PIPES_AND_CHILDREN)
    session.run("coverage", "report")


@nox.session(python=OLDEST_PYTHON)
def tests_oldest(session: nox.Session) -> None:
    """Run the tests with the oldest AnyIO, trio and uvloop that we support, all at once."""
    extras = [requirement for extra in filter(None, BACKENDS.values()) for requirement in EXTRAS[extra]]
    backends = install_with_backends(session, *group("test"))
    session.install("--only-binary=uvloop", *oldest(DEPENDENCIES), *oldest(extras))
    run_tests(session, backends, *NOT_EXHAUSTIVE)


@nox.session(python=False)
def checks(session: nox.Session) -> None:
    """Everything that plain `nox` leaves out: docs, packages, tour, all Pythons, oldest dependencies, coverage."""
    for name in CHECKS:
        session.notify(name, posargs=())


@nox.session(python=ECOSYSTEM_PYTHON)
def ecosystem(session: nox.Session) -> None:
    """Run other people's programs, unmodified, in the event loop on every backend, with real peers."""
    session.install("--editable", ".", *group("ecosystem"), *EXTRAS["trio"], *EXTRAS["uvloop"])
    # pytest-asyncio is there for a test suite that one of the tests runs, and ours does not set its options.
    pytest = ("pytest", "-p", "no:asyncio")
    given = any(argument.startswith("--backend") for argument in session.posargs)
    # Each in a process of its own: what a library leaves behind in one must not disturb another.
    for chosen in [()] if given else [("--backend", backend) for backend in BACKENDS]:
        # uvloop's own close() hangs at times after another library has used uvloop in the process.
        apart = "uvloop" in chosen
        for path in sorted(map(str, Path("ecosystem").glob("test_*.py"))) if apart else ["ecosystem"]:
            session.run(*pytest, path, *chosen, *session.posargs)
    # The blocks of the documentation that need such libraries.
    session.install(*group("test"))
    session.run(*pytest, "tests/test_docs_code.py", "-k", "test_page and (README or asyncio_on_trio)")


@nox.session(python=ECOSYSTEM_PYTHON)
def suites(session: nox.Session) -> None:
    """Run other projects' own tests, unmodified, in our event loop on trio: all of them, or those that are named."""
    known = nox.project.load_toml("suites/suites.toml")
    session.install("--editable", ".", *group("ecosystem"), *EXTRAS["trio"])
    folder = Path(session.create_tmp()).resolve()
    failed = []
    for name in session.posargs or known:
        suite = known[name]
        release = f"{name}=={suite['release']}"
        session.install(release, *suite["requires"])
        session.run(
            "python", "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", str(folder), release
        )
        source = folder / f"{name}-{suite['release']}"
        shutil.rmtree(source, ignore_errors=True)
        shutil.unpack_archive(f"{source}.tar.gz", folder)
        deselected = (f"--deselect={test}" for test in suite["deselect"])
        # Their own options are for their own work: coverage, warnings of this year's libraries as errors.
        own = ("-o", "addopts=", "-o", "filterwarnings=default", "-o", "faulthandler_timeout=60")
        with session.chdir(source):
            try:
                # Without the folder on the path: what is installed is tested, not what lies there.
                session.run(
                    *("python", "-P", "-m", "pytest", "-q", "-p", "on_trio", *own, *suite["options"], *deselected),
                    *suite["tests"],
                    env={"PYTHONPATH": str(ROOT / "suites")},
                )
            except CommandFailed:
                failed.append(name)
    if failed:
        session.error(f"tests failed of {', '.join(failed)}")


@nox.session(python=NEWEST_PYTHON)
def fuzz(session: nox.Session) -> None:
    """Look for differences from asyncio with generated scripts: 2,000 on each backend, or as many as are asked for."""
    backends = install_with_backends(session, *group("test"))
    scripts = session.posargs[0] if session.posargs else "2000"
    for backend in backends:
        # One test, which takes as long as it takes.
        command = ["pytest", "tests/test_generated_scripts.py", "--override-ini", "faulthandler_timeout=0"]
        session.run(*command, "--backend", backend, env={"TRANSPORTS_ANYIO_FUZZ": scripts})


def check_news(session: nox.Session) -> None:
    """Fail unless every news fragment reads as newsfragments/README.md asks."""
    session.run("towncrier", "build", "--draft", "--version", "next", silent=True)
    for fragment in sorted((ROOT / "newsfragments").glob("*.*.md")):
        text = fragment.read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"(\d+|\+[\w-]+)\.(security|removed|changed|added|fixed)\.md", fragment.name):
            session.error(f"{fragment.name}: a number or +word, and a type that newsfragments/README.md has")
        if "\n\n" in text or not text.endswith("."):
            session.error(f"{fragment.name}: one paragraph that ends with a full stop")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, spelling, news fragments and, in a checkout, what GitHub reads."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell", ".")
    check_news(session)
    if (ROOT / ".github").exists():
        for schema, file in (
            ("github-workflows", ".github/workflows/ci.yml"),
            ("dependabot", ".github/dependabot.yml"),
            ("readthedocs", ".readthedocs.yaml"),
        ):
            session.run("check-jsonschema", "--quiet", "--builtin-schema", f"vendor.{schema}", file)
        session.run("zizmor", "--offline", "--quiet", ".github")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, ours, those of users' code and those of the tests, with mypy and pyright."""
    session.install("--editable", ".", *group("test", "types"))
    sources = [name for name in ("transports_anyio", "examples", "tests/typing") if any(ROOT.glob(f"{name}/*.py"))]
    session.run("mypy", *sources)
    for platform in ("darwin", "win32"):
        session.run("mypy", "--platform", platform, "transports_anyio")
    session.run("mypy", "--config-file", "tests/mypy.ini", "tests")
    session.run("pyright", *sources)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build; a warning is an error."""
    session.install("--editable", ".", *group("docs"))
    session.run("sphinx-build", "-W", "--keep-going", "--fresh-env", "-q", "-b", "html", "docs", "docs/_build")


def check_sdist(session: nox.Session, archive: Path) -> None:
    """Fail unless the sdist has every file of the checkout, where there is one: its tests run from it too."""
    if not (ROOT / ".git").exists():
        return
    listed = session.run("git", "ls-files", "-z", external=True, silent=True)
    tracked = {name for name in str(listed).split("\0") if name and not re.search(r"(^|/)\.", name)}
    with tarfile.open(archive) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    if tracked - packed:
        session.error(f"not in the sdist: {', '.join(sorted(tracked - packed))}")


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist, install each alone, check its types, and copy both into the folder given, if any."""
    session.install(*group("package"), *PYPROJECT["project"]["dependencies"])
    outside = Path(session.create_tmp()).resolve()
    built = outside / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built), silent=True)
    archives = sorted(built.iterdir())
    check_sdist(session, next(built.glob("*.tar.gz")))
    session.run("twine", "check", "--strict", *map(str, archives))
    for archive in archives:
        venv = outside / "venv"
        # Without pip, which plain Debian's venv cannot put there: the session's installs into it.
        session.run("python", "-m", "venv", "--clear", "--without-pip", str(venv))
        # Where the checkout is neither imported nor analysed.
        with session.chdir(outside):
            python = str(next(venv.glob("[bS]*/python*")))
            session.run("python", "-m", "pip", "--python", python, "install", "--quiet", str(archive))
            session.run(python, "-I", "-c", LOOK_AT_PACKAGE, PYPROJECT["project"]["version"], external=True)
            # With --verifytypes, pyright looks nowhere but into the environment that it runs in.
            session.install("--force-reinstall", "--no-deps", str(archive))
            session.run("pyright", "--verifytypes", "transports_anyio", "--ignoreexternal")
    for folder in session.posargs:
        shutil.copytree(built, folder, dirs_exist_ok=True)


@nox.session
def tour(session: nox.Session) -> None:
    """Show one echo protocol on every backend, side by side with asyncio's own transports."""
    install_with_backends(session)
    session.run("python", "examples/tour.py", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure processor time beside asyncio, uvloop, trio, AnyIO and trio-asyncio; takes half an hour."""
    session.install(".", *group("benchmarks"))
    session.run("python", "benchmarks/bench_transports.py", *session.posargs)
    if not session.posargs or {"--update", "--add"} & set(session.posargs):
        session.run("python", "benchmarks/report.py")


@nox.session(python=ECOSYSTEM_PYTHON)
def benchmarks_event_loop(session: nox.Session) -> None:
    """Measure asyncio programs on our event loop beside asyncio, uvloop, trio-asyncio, hypercorn and anycorn."""
    session.install(".", *group("benchmarks-event-loop"))
    session.run("python", "benchmarks/bench_event_loop.py", *session.posargs)


@nox.session
def benchmarks_adapters(session: nox.Session) -> None:
    """Measure protocols over AnyIO's streams and datagram sockets beside these themselves."""
    session.install(".", *group("benchmarks"))
    session.run("python", "benchmarks/bench_adapters.py", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Let connections come and go, half of them end badly, and see whether memory stays flat; two minutes a backend."""
    backends = install_with_backends(session, *group("benchmarks"))
    given = any(argument.startswith("--backend") for argument in session.posargs)
    chosen = [] if given else [argument for backend in backends for argument in ("--backend", backend)]
    session.run("python", "benchmarks/soak.py", *chosen, *session.posargs)


@nox.session(python=ECOSYSTEM_PYTHON)
def soak_event_loop(session: nox.Session) -> None:
    """Send requests through uvicorn and aiohttp, half of them from impatient clients: is anything left?"""
    session.install("--editable", ".", *group("ecosystem"), *EXTRAS["trio"], *EXTRAS["uvloop"])
    session.run("python", "benchmarks/soak_event_loop.py", *session.posargs)
