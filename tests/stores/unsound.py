"""The stores that cannot compare-and-swap: refused, unless one asks for less than exactly-once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tests.harness.procs import free_ports, wait_for
from tests.stores.downloads import built, go, maven, npm
from tests.stores.sidecar import Component
from tests.stores.starting import LOOPBACK, checked, namespace, program, running, store, text
from tools.get_dapr import MODULE


@store("etcd", "etcd 3.4", sound=False)
def _etcd(home: Path) -> Iterator[Component]:
    client, peer = (f"http://{LOOPBACK}:{port}" for port in free_ports(2))
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
    with running(command, home / "etcd-home", LOOPBACK, int(address.rpartition(":")[2])):
        yield Component("state.etcd", {"endpoints": address, "tlsEnable": "false", "keyPrefixPath": "outlast"}, "v2")


@store("memcached", "memcached 1.6", sound=False)
def _memcached(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    command = [program("memcached", "memcached"), "-l", LOOPBACK, "-p", str(port), "-U", "0", "-m", "512"]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with running(command, home / "memcached", LOOPBACK, port):
        yield Component("state.memcached", {"hosts": f"{LOOPBACK}:{port}"})


@store("jetstream", "nats-server 2.9", sound=False)
def _jetstream(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    command = [program("nats-server", "nats-server"), "-a", LOOPBACK, "-p", str(port), "-js", "-sd", home / "js"]
    with running(command, home / "nats", LOOPBACK, port):
        _make_bucket(port, "outlast")
        yield Component("state.jetstream", {"natsURL": f"nats://{LOOPBACK}:{port}", "bucket": "outlast"})


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
    with socket.create_connection((LOOPBACK, port), timeout=10) as connection:
        lines = ['CONNECT {"verbose":false}', "SUB made 1", f"PUB $JS.API.STREAM.CREATE.KV_{bucket} made {len(body)}"]
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, body, "PING"]).encode())
        answer = ""
        while '"config"' not in answer:
            answer += connection.recv(65536).decode()
            assert '"error"' not in answer, answer


def _opened() -> list[str]:
    """What of Java Cassandra reaches into."""
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
    return opens


@store("cassandra", "Cassandra 5.0.6", sound=False)
def _cassandra(home: Path) -> Iterator[Component]:
    java, path = maven("org.apache.cassandra:cassandra-all:5.0.6")
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
                "parameters": [{"seeds": f"{LOOPBACK}:{storage}"}],
            }
        ],
        "listen_address": LOOPBACK,
        "rpc_address": LOOPBACK,
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
    command: list[str | Path] = [java, *_opened(), "-Xms512m", "-Xmx512m", "-Djdk.attach.allowAttachSelf=true"]
    command += [f"-Dcassandra.config=file://{home}/cassandra.yaml", f"-Dcassandra.storagedir={home}"]
    command += ["-Dcassandra-foreground=yes", "-Dcassandra.skip_wait_for_gossip_to_settle=0"]
    command += ["-Dcassandra.ring_delay_ms=100", "-Dcassandra.superuser_setup_delay_ms=0", "-cp", path]
    with running([*command, "org.apache.cassandra.service.CassandraDaemon"], home, LOOPBACK, native):
        # The default user is made a moment after the port opens.
        time.sleep(5)
        yield Component(
            "state.cassandra",
            {
                "hosts": LOOPBACK,
                "port": str(native),
                "username": "cassandra",
                "password": "cassandra",
                "consistency": "Quorum",
                "replicationFactor": "1",
            },
        )


@store("coherence", "Coherence CE 25.03.2", sound=False)
def _coherence(home: Path) -> Iterator[Component]:
    names = ("coherence", "coherence-grpc-proxy", "coherence-json")
    java, path = maven(*(f"com.oracle.coherence.ce:{name}:25.03.2" for name in names))
    with namespace() as (host, inside):
        command = [*inside, java, "-Xmx1g", "-Dcoherence.wka=127.0.0.1", "-Dcoherence.localhost=127.0.0.1"]
        command += ["-Dcoherence.grpc.server.port=1408", f"-Dcoherence.grpc.server.address={host}"]
        with running([*command, "-cp", path, "com.tangosol.net.Coherence"], home / "coherence", host, 1408):
            yield Component("state.coherence", {"serverAddress": f"{host}:1408", "requestTimeout": "30s"})


@store("consul", "Consul 1.20.6", sound=False)
def _consul(home: Path) -> Iterator[Component]:
    server = built("github.com/hashicorp/consul", "v1.20.6")
    http, serf, rpc = free_ports(3)
    # In memory, one node.
    command = [server, "agent", "-dev", f"-bind={LOOPBACK}", f"-client={LOOPBACK}", f"-http-port={http}"]
    command += [f"-serf-lan-port={serf}", f"-server-port={rpc}"]
    command += [f"-{name}-port=-1" for name in ("serf-wan", "dns", "grpc", "grpc-tls")]
    with running(command, home / "consul", LOOPBACK, http):
        wait_for(lambda: text(f"http://{LOOPBACK}:{http}/v1/status/leader") != '""', 60, "Consul to have a leader")
        yield Component("state.consul", {"httpAddr": f"{LOOPBACK}:{http}"})


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


@store("cloudflare-workerskv", "miniflare 4, with the worker that Dapr deploys", sound=False)
def _workerskv(home: Path) -> Iterator[Component]:
    library = npm("miniflare")
    source = json.loads(checked([go(), "mod", "download", "-json", "github.com/dapr/components-contrib"], MODULE))
    (port,) = free_ports(1)
    home = home / "miniflare"
    home.mkdir(parents=True)
    shutil.copy(Path(source["Dir"]) / "common/component/cloudflare/workers/code/worker.js", home)
    (home / "server.js").write_text(_MINIFLARE)
    command = [program("node", "nodejs"), home / "server.js", library, str(port), LOOPBACK]
    with running(command, home, LOOPBACK, port):
        settings = {"workerUrl": f"http://{LOOPBACK}:{port}", "workerName": "outlast", "kvNamespaceID": "outlast"}
        yield Component("state.cloudflare.workerskv", {**settings, "key": (home / "key.pem").read_text()})
