"""The stores that can compare-and-swap."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from tests.harness.procs import free_ports
from tests.migrate import postgres
from tests.stores.downloads import built, debian, maven, npm
from tests.stores.sidecar import Component
from tests.stores.starting import LOOPBACK, CannotStart, checked, namespace, not_here, post, program, running, store


@store("embedded", "the embedded sidecar, each process with its own on one file", daprd=False)
def _embedded(home: Path) -> Iterator[Component]:
    yield Component("state.sqlite", {"connectionString": str(home / "outlast.db")})


@store("in-memory", "inside daprd")
def _in_memory(home: Path) -> Iterator[Component]:
    yield Component("state.in-memory")


@store("sqlite", "SQLite file, inside daprd")
def _sqlite(home: Path) -> Iterator[Component]:
    yield Component("state.sqlite", {"connectionString": str(home / "state.sqlite")})


def _on_postgres(kind: str, version: str) -> Callable[[Path], Iterator[Component]]:
    def start(home: Path) -> Iterator[Component]:
        if postgres.binaries() is None:
            raise CannotStart("PostgreSQL is not installed (apt install postgresql)")
        with postgres.server() as url:
            yield Component(kind, {"connectionString": url}, version)

    return start


store("postgresql-v1", "PostgreSQL 15")(_on_postgres("state.postgresql", "v1"))
store("postgresql-v2", "PostgreSQL 15")(_on_postgres("state.postgresql", "v2"))


@store("redis", "Redis 7.0")
def _redis(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    server = program("redis-server", "redis-server")
    with running([server, "--port", str(port), "--bind", LOOPBACK, "--save", ""], home / "redis", LOOPBACK, port):
        yield Component("state.redis", {"redisHost": f"{LOOPBACK}:{port}", "redisPassword": ""})


@store("mysql", "MariaDB 10.11")
def _mysql(home: Path) -> Iterator[Component]:
    server = program("mariadbd", "mariadb-server")
    home = home / "mariadb"
    home.mkdir(parents=True)
    (port,) = free_ports(1)
    user = [f"--user={'root' if os.geteuid() == 0 else os.environ.get('USER', '')}"]
    checked([program("mariadb-install-db", "mariadb-server"), *user, f"--datadir={home}/data"], home)
    (home / "init.sql").write_text(
        "CREATE USER 'dapr'@'127.0.0.1' IDENTIFIED BY 'dapr';\nGRANT ALL ON *.* TO 'dapr'@'127.0.0.1';\n"
    )
    command = [server, "--no-defaults", *user, f"--datadir={home}/data", f"--port={port}"]
    command += [
        "--skip-name-resolve",
        f"--bind-address={LOOPBACK}",
        f"--socket={home}/s",
        f"--init-file={home}/init.sql",
    ]
    with running(command, home, LOOPBACK, port):
        yield Component("state.mysql", {"connectionString": f"dapr:dapr@tcp({LOOPBACK}:{port})/?tls=false"})


store("cockroachdb-v2", "PostgreSQL 15, whose protocol it speaks")(_on_postgres("state.cockroachdb", "v2"))
store("yugabytedb", "PostgreSQL 15, whose protocol it speaks")(_on_postgres("state.yugabytedb", "v2"))


@store("dynamodb", "DynamoDB Local 2.6.1")
def _dynamodb(home: Path) -> Iterator[Component]:
    java, path = maven("com.amazonaws:DynamoDBLocal:2.6.1")
    native = Path(path).parent
    for library in native.glob("libsqlite4java-linux-amd64-*.so"):
        shutil.copy(library, native / "libsqlite4java-linux-amd64.so")
    with namespace() as (host, inside):
        command = [*inside, java, "-Xmx1g", f"-Dsqlite4java.library.path={native}", "-cp", path]
        command += ["com.amazonaws.services.dynamodbv2.local.main.ServerRunner", "-inMemory", "-port", "8000"]
        with running(command, home / "dynamodb", host, 8000):
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
    post(url, body, headers)


_AZURITE_ACCOUNT = "devstoreaccount1"
# The key that Microsoft's documentation of the emulator gives to everybody.
_AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def _azurite(home: Path, service: str) -> Iterator[str]:
    (port,) = free_ports(1)
    server = npm("azurite").parent / ".bin" / f"azurite-{service}"
    command = [server, f"--{service}Host", LOOPBACK, f"--{service}Port", str(port)]
    command += ["--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
    with running(command, home, LOOPBACK, port):
        yield f"http://{LOOPBACK}:{port}/{_AZURITE_ACCOUNT}"


@store("azure-blobstorage", "Azurite")
def _blob(home: Path) -> Iterator[Component]:
    with _azurite(home / "azurite", "blob") as url:
        settings = {"accountName": _AZURITE_ACCOUNT, "accountKey": _AZURITE_KEY, "containerName": "outlast"}
        yield Component("state.azure.blobstorage", {**settings, "endpoint": url.rpartition("/")[0]}, "v2")


@store("azure-tablestorage", "Azurite")
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


@store("azure-cosmosdb", "@vercel/cosmosdb-server, mended: absent documents are 404")
def _cosmosdb(home: Path) -> Iterator[Component]:
    package = npm("@vercel/cosmosdb-server")
    (port,) = free_ports(1)
    home.mkdir(parents=True, exist_ok=True)
    (home / "server.js").write_text(_COSMOS)
    command = [program("node", "nodejs"), home / "server.js", package, str(port), LOOPBACK]
    url = f"http://{LOOPBACK}:{port}"
    with running(command, home / "cosmosdb", LOOPBACK, port):
        post(f"{url}/dbs", {"id": "dapr"})
        post(f"{url}/dbs/dapr/colls", {"id": "outlast", "partitionKey": {"paths": ["/partitionKey"]}})
        settings = {"url": url, "masterKey": _AZURITE_KEY, "database": "dapr", "collection": "outlast"}
        yield Component("state.azure.cosmosdb", settings)


@store("zookeeper", "ZooKeeper 3.4.6")
def _zookeeper(home: Path) -> Iterator[Component]:
    java, path = maven("org.apache.zookeeper:zookeeper:3.4.6")
    (port,) = free_ports(1)
    home.mkdir(parents=True, exist_ok=True)
    (home / "zoo.cfg").write_text(
        f"tickTime=2000\ndataDir={home}/data\nclientPort={port}\nclientPortAddress={LOOPBACK}\n"
    )
    command = [java, "-Dzookeeper.skipACL=yes", "-Dzookeeper.jmx.log4j.disable=true", "-cp", path]
    command += ["org.apache.zookeeper.server.ZooKeeperServerMain", home / "zoo.cfg"]
    with running(command, home / "zookeeper", LOOPBACK, port):
        yield Component(
            "state.zookeeper", {"servers": f"{LOOPBACK}:{port}", "sessionTimeout": "10s", "keyPrefixPath": "/"}
        )


@store("couchbase", "CouchbaseMock 1.5.27")
def _couchbase(home: Path) -> Iterator[Component]:
    java, path = maven("com.couchbase.mock:CouchbaseMock:1.5.27")
    with namespace() as (host, inside):
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
        with running(command, home / "couchbase", host, 8091):
            settings = {
                "couchbaseURL": f"http://{host}:8091",
                "username": "outlast",
                "password": "outlast",
                "bucketName": "outlast",
            }
            yield Component("state.couchbase", settings)


@contextlib.contextmanager
def _documentdb() -> Iterator[str]:
    """PostgreSQL with the extension that FerretDB needs, in a root directory of its own."""
    if os.geteuid() != 0:
        raise CannotStart("DocumentDB is run in a root directory of its own, and that needs root")
    root = debian("postgresql-18-documentdb", "postgresql-18")
    extensions = root / "usr/share/postgresql/18/extension"
    if not (extensions / "postgis.control").exists():
        # What Debian's alternatives would do.
        (extensions / "postgis.control").symlink_to("postgis-3.control")
    mounting = 'mount --bind /dev "$0/dev" && exec chroot "$0" "$@"'
    run = ("unshare", "--mount", "sh", "-c", mounting, str(root), *postgres.NOBODY)
    installed = postgres.Installed(Path("/usr/lib/postgresql/18/bin"), root, run)
    loaded = "shared_preload_libraries=pg_cron,pg_documentdb_core,pg_documentdb"
    with postgres.server(installed, loaded, "cron.database_name=postgres") as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION documentdb CASCADE")
        yield url


@store("mongodb", "FerretDB 2.7.0 on PostgreSQL 18 with DocumentDB 1.0")
def _mongodb(home: Path) -> Iterator[Component]:
    server = built("github.com/FerretDB/FerretDB/v2", "v2.7.0", "github.com/FerretDB/FerretDB/v2/cmd/ferretdb")
    (port,) = free_ports(1)
    with _documentdb() as url:
        command = [server, f"--listen-addr={LOOPBACK}:{port}", f"--postgresql-url={url}", "--no-auth"]
        command += ["--telemetry=disable", "--debug-addr=-", f"--state-dir={home}"]
        with running(command, home / "ferretdb", LOOPBACK, port):
            yield Component("state.mongodb", {"host": f"{LOOPBACK}:{port}", "databaseName": "dapr"})


# --- what nothing here can start


not_here("ravendb", "RavenDB", "its embedded server needs a .NET runtime, which is in no registry here")
