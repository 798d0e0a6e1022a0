"""A private PostgreSQL server on a loopback port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.procs import Child, clean_env, free_ports, wait_for


def binaries() -> Path | None:
    """The folder with initdb and postgres, if there is one."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or ([Path(on_path)] if on_path else [])
    return found[-1].resolve().parent if found else None


@contextmanager
def server() -> Iterator[str]:
    """Run a server with no data, and give its URL."""
    folder = binaries()
    assert folder is not None
    # Not in pytest's folders, which only we see into: PostgreSQL does not run as root.
    home = Path(tempfile.mkdtemp(prefix="outlast-pg-"))
    user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(home, "nobody")
        # It becomes the server itself, which then ends with us.
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig=KILL"]
    try:
        data, (port,) = home / "data", free_ports(1)
        initdb = [str(folder / "initdb"), "-D", str(data), "-U", "outlast", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*user, *initdb, "--locale=C"], check=True, capture_output=True, cwd="/")
        command = [str(folder / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(home), "-F"]
        with Child([*user, *command], log=home / "postgres.log", env=clean_env({}), cwd=Path("/")) as child:
            ready = [str(folder / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, 30, "PostgreSQL", every=0.05)
            try:
                yield f"postgres://outlast@127.0.0.1:{port}/postgres"
            finally:
                # Killed at once it would leave its shared memory behind.
                os.kill(child.pid, signal.SIGINT)
                child.wait(30)
    finally:
        shutil.rmtree(home, ignore_errors=True)
