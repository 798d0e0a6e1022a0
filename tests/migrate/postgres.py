"""A private PostgreSQL server on a loopback port."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.procs import Child, clean_env, free_ports, wait_for


def binaries() -> Path | None:
    """The folder with initdb and postgres, if there is one."""
    on_path = shutil.which("initdb")
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) or ([on_path] if on_path else [])
    return Path(found[-1]).resolve().parent if found else None


@contextmanager
def server() -> Iterator[str]:
    """Run a server with no data, and give its URL."""
    folder = binaries()
    assert folder is not None
    # PostgreSQL does not run as root; its own user does not see into pytest's folders.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    home = Path(tempfile.mkdtemp(prefix="outlast-pg-"))
    try:
        if user:
            os.chown(home, pwd.getpwnam("postgres").pw_uid, -1)
        data, (port,) = home / "data", free_ports(1)
        initdb = [str(folder / "initdb"), "-D", str(data), "-U", "outlast", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*user, *initdb], check=True, capture_output=True, cwd="/")
        command = [str(folder / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(home), "-F"]
        log = home / "postgres.log"
        child = Child([*user, *command], log=log, env=clean_env({}), cwd=Path("/"))
        try:
            ready = [str(folder / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, 30, "PostgreSQL", every=0.05)
            yield f"postgres://outlast@127.0.0.1:{port}/postgres"
        finally:
            # runuser passes SIGTERM on; killed itself it would leave the server behind.
            pid = int((data / "postmaster.pid").read_text().split()[0])
            os.kill(pid, 2)
            child.wait(30)
    finally:
        shutil.rmtree(home, ignore_errors=True)
