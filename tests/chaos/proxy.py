# SPDX-License-Identifier: Apache-2.0
"""proxy.py MODE-FILE LISTEN:TARGET...: TCP proxies on loopback that misbehave on demand.

MODE-FILE is read five times a second:
  pass        forward
  delay MS    forward, MS milliseconds late
  hang        keep connections open, forward nothing
  cut         close all connections and refuse new ones
"""
import asyncio
import sys

mode, writers = ["pass"], set()


async def watch(path):
    while True:
        try:
            mode[:] = open(path, encoding="utf-8").read().split() or ["pass"]
        except OSError:
            mode[:] = ["pass"]
        if mode[0] == "cut":
            for w in list(writers):
                w.close()
        await asyncio.sleep(0.2)


async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            if mode[0] == "delay":
                await asyncio.sleep(int(mode[1]) / 1000)
            while mode[0] == "hang":
                await asyncio.sleep(0.1)
            writer.write(data)
            await writer.drain()
    except (OSError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def serve(listen, target):
    async def accept(reader, writer):
        if mode[0] == "cut":
            writer.close()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        writers.update((writer, up_writer))
        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))
        writers.difference_update((writer, up_writer))

    server = await asyncio.start_server(accept, "127.0.0.1", listen)
    async with server:
        await server.serve_forever()


async def main():
    pairs = [tuple(map(int, p.split(":"))) for p in sys.argv[2:]]
    await asyncio.gather(watch(sys.argv[1]), *(serve(*p) for p in pairs))


asyncio.run(main())
