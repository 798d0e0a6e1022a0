"""Starts the server behind each state store component, as the real product or as the stand-in that is named.

Each entry of `STORES` is a context manager that yields the component to reach its server with. What cannot be started
raises `CannotStart` with the reason, which becomes the reason of the skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.procs import Child, clean_env, free_ports, wait_for
from tests.migrate import postgres
from tests.stores.sidecar import Component
from tools.get_dapr import MODULE, DaprNotFound, find_go

_LOOPBACK = "127.0.0.1"


class CannotStart(Exception):
    """The server cannot be started here; the message says why and what would help."""


Server = Callable[[Path], "contextlib.AbstractContextManager[Component]"]


@dataclass(frozen=True)
class Store:
    """A state store component with its server.

    Attributes:
        server: What answers in these tests, as `docs/stores.md` names it.
        start: Starts it.
        sound: Whether it must pass as exactly-once; else it must be refused, and pass as at-least-once.
        daprd: Whether a daprd stands before it; else what was started is a sidecar itself.
    """

    server: str
    start: Server
    sound: bool = True
    daprd: bool = True


STORES: dict[str, Store] = {}


def _store(
    name: str, server: str, sound: bool = True, daprd: bool = True
) -> Callable[[Callable[[Path], Iterator[Component]]], Server]:
    def enter(start: Callable[[Path], Iterator[Component]]) -> Server:
        managed = contextlib.contextmanager(start)
        STORES[name] = Store(server, managed, sound, daprd)
        return managed

    return enter


def program(name: str, package: str) -> str:
    """The path of an installed program."""
    # Where Debian puts what no ordinary user starts.
    hidden = ["/usr/sbin", "/usr/local/sbin", "/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(hidden))
    if not found:
        raise CannotStart(f"{name} is not installed (apt install {package})")
    return found


@contextlib.contextmanager
def _running(
    command: Sequence[str | Path], home: Path, host: str, port: int, env: Mapping[str, str] | None = None
) -> Iterator[Child]:
    """A server that is up when it accepts connections."""
    home.mkdir(parents=True, exist_ok=True)
    with Child(command, log=home / "server.log", env=clean_env(env or {}), cwd=home) as child:

        def accepts() -> bool:
            assert child.alive, f"{command[0]} ended; it said:\n{child.tail()}"
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
                return True
            return False

        wait_for(accepts, 120, lambda: f"{command[0]}; it said:\n{child.tail()}", every=0.05)
        yield child


def _checked(command: Sequence[str | Path], home: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=home,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotStart(f"{command[0]} failed: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


# --- the stores that can compare-and-swap


@_store("embedded", "the embedded sidecar, each process with its own on one file", daprd=False)
def _embedded(home: Path) -> Iterator[Component]:
    yield Component("state.sqlite", {"connectionString": str(home / "outlast.db")})


@_store("in-memory", "inside daprd")
def _in_memory(home: Path) -> Iterator[Component]:
    yield Component("state.in-memory")


@_store("sqlite", "SQLite file, inside daprd")
def _sqlite(home: Path) -> Iterator[Component]:
    yield Component("state.sqlite", {"connectionString": str(home / "state.sqlite")})


def _on_postgres(kind: str, version: str) -> Callable[[Path], Iterator[Component]]:
    def start(home: Path) -> Iterator[Component]:
        if postgres.binaries() is None:
            raise CannotStart("PostgreSQL is not installed (apt install postgresql)")
        with postgres.server() as url:
            yield Component(kind, {"connectionString": url}, version)

    return start


_store("postgresql-v1", "PostgreSQL 15")(_on_postgres("state.postgresql", "v1"))
_store("postgresql-v2", "PostgreSQL 15")(_on_postgres("state.postgresql", "v2"))


@_store("redis", "Redis 7.0")
def _redis(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    server = program("redis-server", "redis-server")
    with _running([server, "--port", str(port), "--bind", _LOOPBACK, "--save", ""], home / "redis", _LOOPBACK, port):
        yield Component("state.redis", {"redisHost": f"{_LOOPBACK}:{port}", "redisPassword": ""})


@_store("mysql", "MariaDB 10.11")
def _mysql(home: Path) -> Iterator[Component]:
    server = program("mariadbd", "mariadb-server")
    home = home / "mariadb"
    home.mkdir(parents=True)
    (port,) = free_ports(1)
    user = [f"--user={'root' if os.geteuid() == 0 else os.environ.get('USER', '')}"]
    _checked([program("mariadb-install-db", "mariadb-server"), *user, f"--datadir={home}/data"], home)
    (home / "init.sql").write_text(
        "CREATE USER 'dapr'@'127.0.0.1' IDENTIFIED BY 'dapr';\nGRANT ALL ON *.* TO 'dapr'@'127.0.0.1';\n"
    )
    command = [server, "--no-defaults", *user, f"--datadir={home}/data", f"--port={port}"]
    command += [
        "--skip-name-resolve",
        f"--bind-address={_LOOPBACK}",
        f"--socket={home}/s",
        f"--init-file={home}/init.sql",
    ]
    with _running(command, home, _LOOPBACK, port):
        yield Component("state.mysql", {"connectionString": f"dapr:dapr@tcp({_LOOPBACK}:{port})/?tls=false"})


_store("cockroachdb-v2", "PostgreSQL 15, whose protocol it speaks")(_on_postgres("state.cockroachdb", "v2"))
_store("yugabytedb", "PostgreSQL 15, whose protocol it speaks")(_on_postgres("state.yugabytedb", "v2"))


@contextlib.contextmanager
def _namespace() -> Iterator[tuple[str, list[str]]]:
    """A network namespace for servers that bind every interface: yields its address and what to start them with.

    Nothing but this host reaches it, over a pair of virtual interfaces.
    """
    tool = program("ip", "iproute2")
    if os.geteuid() != 0:
        raise CannotStart("it binds every interface, so it needs a network namespace, and those need root")
    token = secrets.token_hex(2)
    name, outer, inner = f"ol-{token}", f"ol{token}o", f"ol{token}i"
    net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    inside = [tool, "netns", "exec", name]
    _checked([tool, "netns", "add", name], Path("/"))
    try:
        _checked([tool, "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name], Path("/"))
        _checked([tool, "addr", "add", f"{net}.1/30", "dev", outer], Path("/"))
        _checked([tool, "link", "set", outer, "up"], Path("/"))
        _checked([*inside, tool, "addr", "add", f"{net}.2/30", "dev", inner], Path("/"))
        for device in (inner, "lo"):
            _checked([*inside, tool, "link", "set", device, "up"], Path("/"))
        yield f"{net}.2", inside
    finally:
        subprocess.run([tool, "netns", "del", name], check=False)


def _downloads() -> Path:
    root = os.environ.get("OUTLAST_CACHE") or os.path.expanduser("~/.cache/outlast")
    return Path(root) / "stores"


def _java(*artifacts: str) -> tuple[str, str]:
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
        _checked([maven, "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=jars"], home)
        done.write_text(f"{home}/jars/*")
    return java, done.read_text()


def _go() -> str:
    try:
        return find_go()
    except DaprNotFound as error:
        raise CannotStart(str(error)) from None


def _built(module: str, version: str) -> Path:
    """Return the program of a Go module, built from source."""
    home = _downloads() / "go" / f"{module.rpartition('/')[2]}-{version}"
    done = home / "server"
    if not done.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "go.mod").write_text("module outlast/server\n")
        # A module that Consul needs is in the proxy and not in the checksum database.
        env = {"GOFLAGS": "-mod=mod", "CGO_ENABLED": "0", "GONOSUMDB": "github.com/hashicorp/consul-awsauth"}
        _checked([_go(), "get", f"{module}@{version}"], home, env)
        _checked([_go(), "build", "-trimpath", "-ldflags=-s -w", "-o", "built", module], home, env)
        (home / "built").rename(done)
    return done


def _node(package: str) -> Path:
    """Return the folder of an npm package."""
    home = _downloads() / "npm" / package.replace("/", "-")
    found = home / "node_modules" / package
    if not found.exists():
        npm = program("npm", "npm")
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text('{"private": true}')
        _checked([npm, "install", "--no-audit", "--no-fund", "--loglevel=error", package], home)
    return found


@_store("dynamodb", "DynamoDB Local 2.6.1")
def _dynamodb(home: Path) -> Iterator[Component]:
    java, path = _java("com.amazonaws:DynamoDBLocal:2.6.1")
    native = Path(path).parent
    for library in native.glob("libsqlite4java-linux-amd64-*.so"):
        shutil.copy(library, native / "libsqlite4java-linux-amd64.so")
    with _namespace() as (host, inside):
        command = [*inside, java, "-Xmx1g", f"-Dsqlite4java.library.path={native}", "-cp", path]
        command += ["com.amazonaws.services.dynamodbv2.local.main.ServerRunner", "-inMemory", "-port", "8000"]
        with _running(command, home / "dynamodb", host, 8000):
            _make_table(f"http://{host}:8000", "outlast")
            yield Component(
                "state.aws.dynamodb",
                {
                    "endpoint": f"http://{host}:8000",
                    "region": "us-east-1",
                    "accessKey": "local",
                    "secretKey": "local",
                    "table": "outlast",
                },
            )


def _make_table(url: str, table: str) -> None:
    body = {
        "TableName": table,
        "AttributeDefinitions": [{"AttributeName": "key", "AttributeType": "S"}],
        "KeySchema": [{"AttributeName": "key", "KeyType": "HASH"}],
        "BillingMode": "PAY_PER_REQUEST",
    }
    # DynamoDB Local reads the key id from the signature and does not check it.
    scope = "local/20260101/us-east-1/dynamodb/aws4_request"
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": "DynamoDB_20120810.CreateTable",
        "Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0",
    }
    _post(url, body, headers)


_AZURITE_ACCOUNT = "devstoreaccount1"
# The key that Microsoft's documentation of the emulator gives to everybody.
_AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def _azurite(home: Path, service: str) -> Iterator[str]:
    (port,) = free_ports(1)
    server = _node("azurite").parent / ".bin" / f"azurite-{service}"
    command = [server, f"--{service}Host", _LOOPBACK, f"--{service}Port", str(port)]
    command += ["--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
    with _running(command, home, _LOOPBACK, port):
        yield f"http://{_LOOPBACK}:{port}/{_AZURITE_ACCOUNT}"


@_store("azure-blobstorage", "Azurite")
def _blob(home: Path) -> Iterator[Component]:
    with _azurite(home / "azurite", "blob") as url:
        settings = {"accountName": _AZURITE_ACCOUNT, "accountKey": _AZURITE_KEY, "containerName": "outlast"}
        yield Component("state.azure.blobstorage", {**settings, "endpoint": url.rpartition("/")[0]}, "v2")


@_store("azure-tablestorage", "Azurite")
def _table(home: Path) -> Iterator[Component]:
    with _azurite(home / "azurite", "table") as url:
        settings = {"accountName": _AZURITE_ACCOUNT, "accountKey": _AZURITE_KEY, "tableName": "outlast"}
        yield Component("state.azure.tablestorage", {**settings, "serviceURL": url})


# The emulator answers a read of what is not there with a crash, 500, where Cosmos DB says 404.
_COSMOS = """
const lib = process.argv[2] + "/lib";
const reading = require(lib + "/handler/read-document");
const { default: header, parsePartitionKey } = require(lib + "/utils/get-partition-from-header");
const read = reading.default;
reading.default = (account, req, res, params) => {
  const collection = account.database(params.dbId).collection(params.collId);
  if (collection.document(params.docId, parsePartitionKey(header(req), params.docId)).read()) {
    return read(account, req, res, params);
  }
  res.statusCode = 404;
  return { code: "NotFound", message: "there is no such document" };
};
require(lib).createHttpServer({ keepAlive: true }).listen(Number(process.argv[3]), process.argv[4]);
"""


@_store("azure-cosmosdb", "@vercel/cosmosdb-server, mended: absent documents are 404")
def _cosmosdb(home: Path) -> Iterator[Component]:
    package = _node("@vercel/cosmosdb-server")
    (port,) = free_ports(1)
    home.mkdir(parents=True, exist_ok=True)
    (home / "server.js").write_text(_COSMOS)
    command = [program("node", "nodejs"), home / "server.js", package, str(port), _LOOPBACK]
    url = f"http://{_LOOPBACK}:{port}"
    with _running(command, home / "cosmosdb", _LOOPBACK, port):
        _post(f"{url}/dbs", {"id": "dapr"})
        _post(f"{url}/dbs/dapr/colls", {"id": "outlast", "partitionKey": {"paths": ["/partitionKey"]}})
        settings = {"url": url, "masterKey": _AZURITE_KEY, "database": "dapr", "collection": "outlast"}
        yield Component("state.azure.cosmosdb", settings)


def _post(url: str, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
    )
    urllib.request.urlopen(request, timeout=30).close()


@_store("zookeeper", "ZooKeeper 3.4.6")
def _zookeeper(home: Path) -> Iterator[Component]:
    java, path = _java("org.apache.zookeeper:zookeeper:3.4.6")
    (port,) = free_ports(1)
    home.mkdir(parents=True, exist_ok=True)
    (home / "zoo.cfg").write_text(
        f"tickTime=2000\ndataDir={home}/data\nclientPort={port}\nclientPortAddress={_LOOPBACK}\n"
    )
    command = [java, "-Dzookeeper.skipACL=yes", "-Dzookeeper.jmx.log4j.disable=true", "-cp", path]
    command += ["org.apache.zookeeper.server.ZooKeeperServerMain", home / "zoo.cfg"]
    with _running(command, home / "zookeeper", _LOOPBACK, port):
        yield Component(
            "state.zookeeper", {"servers": f"{_LOOPBACK}:{port}", "sessionTimeout": "10s", "keyPrefixPath": "/"}
        )


@_store("couchbase", "CouchbaseMock 1.5.27")
def _couchbase(home: Path) -> Iterator[Component]:
    java, path = _java("com.couchbase.mock:CouchbaseMock:1.5.27")
    with _namespace() as (host, inside):
        command = [*inside, java, "-cp", path, "com.couchbase.mock.CouchbaseMock"]
        command += [
            "--host",
            host,
            "--port",
            "8091",
            "--nodes",
            "1",
            "--replicas",
            "0",
            "--buckets",
            "outlast:outlast:",
        ]
        with _running(command, home / "couchbase", host, 8091):
            settings = {
                "couchbaseURL": f"http://{host}:8091",
                "username": "outlast",
                "password": "outlast",
                "bucketName": "outlast",
            }
            yield Component("state.couchbase", settings)


# --- the stores that cannot


@_store("etcd", "etcd 3.4", sound=False)
def _etcd(home: Path) -> Iterator[Component]:
    client, peer = (f"http://{_LOOPBACK}:{port}" for port in free_ports(2))
    command = [
        program("etcd", "etcd-server"),
        f"--data-dir={home}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
    ]
    address = client.removeprefix("http://")
    with _running(command, home / "etcd-home", _LOOPBACK, int(address.rpartition(":")[2])):
        yield Component("state.etcd", {"endpoints": address, "tlsEnable": "false", "keyPrefixPath": "outlast"}, "v2")


@_store("memcached", "memcached 1.6", sound=False)
def _memcached(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    command = [program("memcached", "memcached"), "-l", _LOOPBACK, "-p", str(port), "-U", "0", "-m", "512"]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with _running(command, home / "memcached", _LOOPBACK, port):
        yield Component("state.memcached", {"hosts": f"{_LOOPBACK}:{port}"})


@_store("jetstream", "nats-server 2.9", sound=False)
def _jetstream(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    command = [program("nats-server", "nats-server"), "-a", _LOOPBACK, "-p", str(port), "-js", "-sd", home / "js"]
    with _running(command, home / "nats", _LOOPBACK, port):
        _make_bucket(port, "outlast")
        yield Component("state.jetstream", {"natsURL": f"nats://{_LOOPBACK}:{port}", "bucket": "outlast"})


def _make_bucket(port: int, bucket: str) -> None:
    """Create a key-value bucket: a stream of a certain form, asked for in the NATS protocol."""
    stream = {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "max_msgs_per_subject": 1,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "storage": "memory",
        "retention": "limits",
        "num_replicas": 1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_consumers": -1,
    }
    body = json.dumps(stream)
    with socket.create_connection((_LOOPBACK, port), timeout=10) as connection:
        lines = ['CONNECT {"verbose":false}', "SUB made 1", f"PUB $JS.API.STREAM.CREATE.KV_{bucket} made {len(body)}"]
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, body, "PING"]).encode())
        answer = ""
        while '"config"' not in answer:
            answer += connection.recv(65536).decode()
            assert '"error"' not in answer, answer


@_store("cassandra", "Cassandra 5.0.6", sound=False)
def _cassandra(home: Path) -> Iterator[Component]:
    java, path = _java("org.apache.cassandra:cassandra-all:5.0.6")
    home = home / "cassandra"
    home.mkdir(parents=True)
    native, storage = free_ports(2)
    settings = {
        "cluster_name": "outlast",
        "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
        "endpoint_snitch": "SimpleSnitch",
        "seed_provider": [
            {
                "class_name": "org.apache.cassandra.locator.SimpleSeedProvider",
                "parameters": [{"seeds": f"{_LOOPBACK}:{storage}"}],
            }
        ],
        "listen_address": _LOOPBACK,
        "rpc_address": _LOOPBACK,
        "storage_port": storage,
        "native_transport_port": native,
        "start_native_transport": True,
        "commitlog_sync": "periodic",
        "commitlog_sync_period": "10000ms",
        "commitlog_directory": f"{home}/commitlog",
        "data_file_directories": [f"{home}/data"],
        "saved_caches_directory": f"{home}/saved",
        "hints_directory": f"{home}/hints",
        "cdc_raw_directory": f"{home}/cdc",
        "authenticator": "PasswordAuthenticator",
        "authorizer": "AllowAllAuthorizer",
    }
    # JSON is YAML.
    (home / "cassandra.yaml").write_text(json.dumps(settings))
    opened = ("lang", "lang.module", "lang.reflect", "math", "io", "net", "nio", "util", "util.concurrent")
    opens = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in opened]
    opens += [f"--add-opens=java.base/java.util.concurrent.{name}=ALL-UNNAMED" for name in ("atomic", "locks")]
    inner = ("misc", "ref", "reflect", "math", "module", "util.jar", "loader")
    opens += [f"--add-opens=java.base/jdk.internal.{name}=ALL-UNNAMED" for name in inner]
    opens += [f"--add-exports=java.base/jdk.internal.{name}=ALL-UNNAMED" for name in inner]
    opens += ["--add-exports=java.base/sun.nio.ch=ALL-UNNAMED", "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED"]
    opens += [f"--add-exports=java.{part}=ALL-UNNAMED" for part in ("rmi/sun.rmi.registry", "rmi/sun.rmi.server")]
    opens += [f"--add-exports=java.rmi/sun.rmi.transport{part}=ALL-UNNAMED" for part in ("", ".tcp")]
    opens += ["--add-exports=jdk.unsupported/sun.misc=ALL-UNNAMED", "--add-exports=java.sql/java.sql=ALL-UNNAMED"]
    opens += ["--add-opens=jdk.management/com.sun.management.internal=ALL-UNNAMED"]
    command: list[str | Path] = [java, *opens, "-Xms512m", "-Xmx512m", "-Djdk.attach.allowAttachSelf=true"]
    command += [f"-Dcassandra.config=file://{home}/cassandra.yaml", f"-Dcassandra.storagedir={home}"]
    command += ["-Dcassandra-foreground=yes", "-Dcassandra.skip_wait_for_gossip_to_settle=0"]
    command += ["-Dcassandra.ring_delay_ms=100", "-Dcassandra.superuser_setup_delay_ms=0", "-cp", path]
    with _running([*command, "org.apache.cassandra.service.CassandraDaemon"], home, _LOOPBACK, native):
        # The default user is made a moment after the port opens.
        time.sleep(5)
        yield Component(
            "state.cassandra",
            {
                "hosts": _LOOPBACK,
                "port": str(native),
                "username": "cassandra",
                "password": "cassandra",
                "consistency": "Quorum",
                "replicationFactor": "1",
            },
        )


@_store("coherence", "Coherence CE 25.03.2", sound=False)
def _coherence(home: Path) -> Iterator[Component]:
    names = ("coherence", "coherence-grpc-proxy", "coherence-json")
    java, path = _java(*(f"com.oracle.coherence.ce:{name}:25.03.2" for name in names))
    with _namespace() as (host, inside):
        command = [*inside, java, "-Xmx1g", "-Dcoherence.wka=127.0.0.1", "-Dcoherence.localhost=127.0.0.1"]
        command += ["-Dcoherence.grpc.server.port=1408", f"-Dcoherence.grpc.server.address={host}"]
        with _running([*command, "-cp", path, "com.tangosol.net.Coherence"], home / "coherence", host, 1408):
            yield Component("state.coherence", {"serverAddress": f"{host}:1408", "requestTimeout": "30s"})


@_store("consul", "Consul 1.20.6", sound=False)
def _consul(home: Path) -> Iterator[Component]:
    server = _built("github.com/hashicorp/consul", "v1.20.6")
    http, serf, rpc = free_ports(3)
    # In memory, one node.
    command = [server, "agent", "-dev", f"-bind={_LOOPBACK}", f"-client={_LOOPBACK}", f"-http-port={http}"]
    command += [f"-serf-lan-port={serf}", f"-server-port={rpc}"]
    command += [f"-{name}-port=-1" for name in ("serf-wan", "dns", "grpc", "grpc-tls")]
    with _running(command, home / "consul", _LOOPBACK, http):
        wait_for(lambda: _text(f"http://{_LOOPBACK}:{http}/v1/status/leader") != '""', 60, "Consul to have a leader")
        yield Component("state.consul", {"httpAddr": f"{_LOOPBACK}:{http}"})


def _text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        text: str = response.read().decode().strip()
    return text


_MINIFLARE = """
const [, , library, port, host] = process.argv;
const { Miniflare } = require(library);
const pem = (type) => ({ type, format: "pem" });
const pair = require("node:crypto").generateKeyPairSync("ed25519", {
  publicKeyEncoding: pem("spki"), privateKeyEncoding: pem("pkcs8"),
});
require("node:fs").writeFileSync("key.pem", pair.privateKey);
new Miniflare({
  host, port: Number(port), modules: true, scriptPath: "worker.js", compatibilityDate: "2022-12-09",
  kvNamespaces: ["outlast"], bindings: { PUBLIC_KEY: pair.publicKey, TOKEN_AUDIENCE: "outlast" },
});
"""


@_store("cloudflare-workerskv", "miniflare 4, with the worker that Dapr deploys", sound=False)
def _workerskv(home: Path) -> Iterator[Component]:
    library = _node("miniflare")
    source = json.loads(_checked([_go(), "mod", "download", "-json", "github.com/dapr/components-contrib"], MODULE))
    (port,) = free_ports(1)
    home = home / "miniflare"
    home.mkdir(parents=True)
    shutil.copy(Path(source["Dir"]) / "common/component/cloudflare/workers/code/worker.js", home)
    (home / "server.js").write_text(_MINIFLARE)
    command = [program("node", "nodejs"), home / "server.js", library, str(port), _LOOPBACK]
    with _running(command, home, _LOOPBACK, port):
        settings = {"workerUrl": f"http://{_LOOPBACK}:{port}", "workerName": "outlast", "kvNamespaceID": "outlast"}
        yield Component("state.cloudflare.workerskv", {**settings, "key": (home / "key.pem").read_text()})


# --- the stores that nothing here can start


def _not_here(name: str, server: str, reason: str, sound: bool = True) -> None:
    def start(home: Path) -> Iterator[Component]:
        raise CannotStart(reason)
        yield

    _store(name, server, sound)(start)


_not_here("mongodb", "FerretDB", "mongod is in no registry; FerretDB needs PostgreSQL with the DocumentDB extension")
_not_here("ravendb", "RavenDB", "its embedded server needs a .NET runtime, which is in no registry here")
