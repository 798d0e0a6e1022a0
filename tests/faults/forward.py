"""A program that hands TCP connections on: `forward.py LISTEN_HOST CONNECT_HOST PORT …`."""

from __future__ import annotations

import asyncio
import functools
import sys


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _serve(host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        there, back = await asyncio.open_connection(host, port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_pump(reader, back), _pump(there, writer))


async def _main(listen: str, connect: str, ports: list[int]) -> None:
    for port in ports:
        await asyncio.start_server(functools.partial(_serve, connect, port), listen, port)
    sys.stdout.write("forwarding\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], [int(port) for port in sys.argv[3:]]))
