"""Find or build the Dapr runtime the tests run on, and print the directory that holds it.

Three binaries are needed: daprd, placement and scheduler. They are taken from PATH or from `~/.dapr/bin` when all three
are there and daprd has the right minor version; else they are built from the module in tools/dapr into a cache outside
the tree (`$OUTLAST_CACHE`, else `$XDG_CACHE_HOME/outlast`, else `~/.cache/outlast`). Only the standard library is used.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BINARIES = ("placement", "scheduler", "daprd")  # daprd last: it takes longest
MODULE = Path(__file__).resolve().parent / "dapr"
ALTERNATIVE = (
    "Or install Dapr {minor} with its own installer, which brings the three binaries to ~/.dapr/bin: "
    "`dapr init --slim --runtime-version {version}` (https://docs.dapr.io/getting-started/install-dapr-cli/)."
)


class DaprNotFound(Exception):
    """There is no usable Dapr runtime; the message says how to get one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-build", action="store_true", help="only look; fail when there is none")
    parser.add_argument("--build", action="store_true", help="do not look for an installed Dapr")
    args = parser.parse_args()
    try:
        directory = (None if args.build else installed()) or cached()
        if directory is None:
            if args.no_build:
                raise DaprNotFound(f"No Dapr {pinned_version()} found. Run `make dapr`.")
            directory = build()
    except DaprNotFound as error:
        raise SystemExit(f"get_dapr: {error}") from None
    print(directory)


def find() -> Path:
    """The directory of the three binaries, without building them."""
    directory = installed() or cached()
    if directory is None:
        raise DaprNotFound(f"No Dapr {pinned_version()} found. Run `make dapr`.")
    return directory


def pinned_version() -> str:
    match = re.search(r"^\s*github\.com/dapr/dapr v(\S+)", (MODULE / "go.mod").read_text(), re.MULTILINE)
    assert match, "tools/dapr/go.mod does not name github.com/dapr/dapr"
    return match[1]


def installed() -> Path | None:
    """A Dapr of the pinned minor version on PATH or in ~/.dapr/bin."""
    minor = pinned_version().rsplit(".", 1)[0]
    on_path = shutil.which("daprd")
    candidates = [Path(on_path).parent] if on_path else []
    candidates.append(Path.home() / ".dapr" / "bin")
    for directory in candidates:
        if not all(os.access(directory / name, os.X_OK) for name in BINARIES):
            continue
        done = subprocess.run([directory / "daprd", "--version"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip().startswith(f"{minor}."):
            return directory
    return None


def cached() -> Path | None:
    directory = cache_directory()
    return directory if all((directory / name).exists() for name in BINARIES) else None


def cache_directory() -> Path:
    root = os.environ.get("OUTLAST_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "outlast")
    checksum = hashlib.sha256((MODULE / "go.sum").read_bytes()).hexdigest()[:12]
    return Path(root).absolute() / "dapr" / f"{pinned_version()}-{checksum}"


def build() -> Path:
    """Build the three binaries beside their place in the cache, and move them there in one step."""
    go = find_go()
    target = cache_directory()
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"building Dapr {pinned_version()} from source, once (5 to 15 minutes, and up to 8 GB for Go's caches)")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as temporary:
        staging = Path(temporary) / "bin"
        staging.mkdir()
        for name in BINARIES:
            started = time.monotonic()
            say(f"building {name} ...")
            build_one(go, name, staging)
            say(f"built {name} in {time.monotonic() - started:.0f} s")
        if cached() is None:  # else somebody built the same beside us, and theirs is as good
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
    return target


def build_one(go: str, name: str, staging: Path) -> None:
    version_flag = f"-X github.com/dapr/dapr/pkg/buildinfo.version={pinned_version()}"
    # Without the tag, daprd has no components and panics at start.
    command = [go, "build", "-mod=readonly", "-tags=allcomponents", "-trimpath", f"-ldflags=-s -w {version_flag}"]
    command += ["-o", str(staging / name), f"github.com/dapr/dapr/cmd/{name}"]
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
    done = subprocess.run(command, cwd=MODULE, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise DaprNotFound(f"`go build` of {name} failed, see above. {alternative()}")


def find_go() -> str:
    needed = re.search(r"^go (\S+)", (MODULE / "go.mod").read_text(), re.MULTILINE)
    assert needed, "tools/dapr/go.mod names no Go version"
    go = shutil.which("go")
    if go is None:
        raise DaprNotFound(
            f"Go is not installed, and it is needed to build Dapr. Install Go {needed[1]} or newer "
            f"(https://go.dev/dl/). {alternative()}"
        )
    # Run in the module: Go 1.21 or newer then fetches the toolchain the module asks for, where it is allowed to.
    done = subprocess.run([go, "env", "GOVERSION"], cwd=MODULE, capture_output=True, text=True, check=False)
    version = done.stdout.strip().removeprefix("go")
    if done.returncode or numbers(version) < numbers(needed[1]):
        said = done.stderr.strip() or f"this is Go {version}"
        raise DaprNotFound(f"Building Dapr needs Go {needed[1]} or newer: {said}. {alternative()}")
    return go


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def alternative() -> str:
    version = pinned_version()
    return ALTERNATIVE.format(version=version, minor=version.rsplit(".", 1)[0])


def say(text: str) -> None:
    print(f"[dapr] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
