"""A private PostgreSQL server on a loopback port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.procs import Child, clean_env, free_ports, wait_for

# It becomes what is run, which then ends with us. PostgreSQL does not run as root.
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig=KILL")


@dataclass(frozen=True)
class Installed:
    """A PostgreSQL.

    Attributes:
        programs: The folder of its programs.
        root: The root directory they see.
        run: What to start them with.
    """

    programs: Path
    root: Path = Path("/")
    run: Sequence[str] = NOBODY if os.geteuid() == 0 else ()

    def command(self, program: str, *arguments: str | Path) -> list[str]:
        return [*self.run, str(self.programs / program), *map(str, arguments)]


def binaries() -> Path | None:
    """The folder with initdb and postgres, if there is one."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or ([Path(on_path)] if on_path else [])
    return found[-1].resolve().parent if found else None


@contextmanager
def server(installed: Installed | None = None, *settings: str) -> Iterator[str]:
    """Run a server with no data, and give its URL."""
    if installed is None:
        folder = binaries()
        assert folder is not None
        installed = Installed(folder)
    # Not in pytest's folders, which only we see into.
    outside = Path(tempfile.mkdtemp(prefix="outlast-pg-", dir=installed.root / "tmp"))
    home = Path("/") / outside.relative_to(installed.root)
    if os.geteuid() == 0:
        os.chown(outside, 65534, 65534)
    try:
        (port,) = free_ports(1)
        initdb = installed.command("initdb", "-D", home / "data", "-U", "outlast", "-A", "trust", "--no-sync")
        subprocess.run([*initdb, "--encoding=UTF8", "--locale=C"], check=True, capture_output=True, cwd="/")
        where = ("-D", home / "data", "-h", "127.0.0.1", "-p", str(port), "-k", home)
        options = [part for setting in settings for part in ("-c", setting)]
        command = installed.command("postgres", *where, "-F", *options)
        with Child(command, log=outside / "postgres.log", env=clean_env({}), cwd=Path("/")) as child:
            ready = installed.command("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port))
            wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, 30, child.tail, every=0.05)
            try:
                yield f"postgres://outlast@127.0.0.1:{port}/postgres"
            finally:
                # Killed at once it would leave its shared memory behind.
                os.kill(child.pid, signal.SIGINT)
                child.wait(30)
    finally:
        shutil.rmtree(outside, ignore_errors=True)
