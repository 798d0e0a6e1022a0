"""Create the virtual environment for development: with uv where it is installed, else with venv and pip.

Both ways install the versions in uv.lock. Only the standard library is used; the file must also parse on an old
Python, so that it can say what is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time

OLDEST, NEWEST = (3, 11), (3, 13)
EXTRAS = "langgraph,openai-agents"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--stamp", default=".venv/.ready", help="written when all went well")
    args = parser.parse_args()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    started = time.monotonic()
    uv = shutil.which("uv")
    if uv:
        with_uv(uv, args.venv)
    else:
        with_pip(find_python(), args.venv)
    with open(args.stamp, "w") as stamp:
        stamp.write("set up by tools/bootstrap.py\n")
    say(f"ready in {time.monotonic() - started:.0f} s")


def with_uv(uv: str, venv: str) -> None:
    say(f"creating {venv} with uv")
    environment = dict(os.environ, UV_PROJECT_ENVIRONMENT=venv)
    environment.pop("VIRTUAL_ENV", None)
    python = ["--python", sys.executable] if fits() else []  # else uv finds or fetches one
    run([uv, "sync", "--frozen", "--all-extras", "--quiet", *python], env=environment)


def with_pip(python: str, venv: str) -> None:
    say(f"creating {venv} with venv and pip (uv is not installed; that is fine, only slower)")
    run([python, "-m", "venv", "--clear", venv])
    pip = [os.path.join(venv, "bin", "python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--upgrade", "pip>=25.1"])  # the first with --group
    constraints = os.path.join(venv, "constraints.txt")
    run([pip[0], os.path.abspath(__file__), "--write-constraints", constraints])
    say("installing outlast, its extras and the development tools (a minute or two)")
    run([*pip, "install", "--quiet", "-c", constraints, "-e", f".[{EXTRAS}]", "--group", "dev"])


def fits() -> bool:
    return OLDEST <= sys.version_info[:2] <= NEWEST


def find_python() -> str:
    """This Python where it fits, else the newest fitting one on PATH."""
    if fits():
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return found
    raise SystemExit(
        "outlast needs Python {}.{} to {}.{}, this is {}.{}. Install one of them, or uv, which fetches one by itself; "
        "or say where one is: make PYTHON=/path/to/python3.12".format(*OLDEST, *NEWEST, *sys.version_info[:2])
    )


def write_constraints(path: str) -> None:
    """Turn uv.lock into constraints for pip; a package locked at several versions is left to pip."""
    import tomllib

    with open("uv.lock", "rb") as lock:
        packages = tomllib.load(lock)["package"]
    versions: dict[str, list[str]] = {}
    for package in packages:
        if "registry" in package["source"]:
            versions.setdefault(package["name"], []).append(package["version"])
    with open(path, "w") as constraints:
        for name, locked in sorted(versions.items()):
            if len(locked) == 1:
                constraints.write(f"{name}=={locked[0]}\n")


def run(command: "list[str]", env: "dict[str, str] | None" = None) -> None:
    code = subprocess.call(command, env=env)
    if code:
        raise SystemExit("setup failed: `{}` ended with status {}".format(" ".join(command), code))


def say(text: str) -> None:
    print("[setup] " + text, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write-constraints"]:
        write_constraints(sys.argv[2])
    else:
        main()
