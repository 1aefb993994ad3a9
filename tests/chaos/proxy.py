# SPDX-License-Identifier: Apache-2.0
"""proxy.py MODE-FILE LISTEN:TARGET...: TCP proxies on loopback that misbehave on demand.

MODE-FILE is read five times a second:
  pass          forward
  delay MS      forward, MS milliseconds late
  hang          keep connections open, forward nothing
  cut           close all connections and refuse new ones
The standard output says how many connections each mode has met, once it is over.

or, for Kafka without TLS, lines that each fault one request: the first with this API key (produce 0,
offset commit 8, offset fetch 9, leave group 13, init producer id 22, end transaction 26, offset
commit in a transaction 28) from this client.id since the file was changed. The standard output says
when it has come.
  hang-at KEY CLIENT      from this request on nothing of the client's is forwarded
  lose KEY CLIENT         its answer is lost: it is forwarded, and its connection closed
  late KEY CLIENT MS      it, and what follows on its connection, is held for so long, and gets to the
                          broker even if the client has closed the connection meanwhile
"""
import asyncio
import struct
import sys

mode, rules, hung, writers, met = ["pass"], [], set(), set(), [0]


def parse(text):
    lines = [line.split() for line in text.splitlines() if line.split()] or [["pass"]]
    mode[:] = lines[0] if lines[0][0] in ("pass", "delay", "hang", "cut") else ["pass"]
    rules[:] = [r for r in lines if r[0] in ("hang-at", "lose", "late")]
    hung.clear()


async def watch(path):
    last = None
    while True:
        try:
            text = open(path, encoding="utf-8").read()
        except OSError:
            text = ""
        if text != last:
            if last is not None:
                print("mode", mode[0], "met", met[0], "connections", flush=True)
            parse(text)
            last, met[0] = text, len(writers) // 2
        if mode[0] == "cut":
            for w in list(writers):
                w.close()
        await asyncio.sleep(0.2)


def rule_for(frame):
    """The rule that waits for this request, which is done with then. Also: whose request is it?"""
    if len(frame) < 14:
        return None, None
    key, _, _, n = struct.unpack_from(">hhih", frame, 4)
    client = frame[14:14 + max(n, 0)].decode(errors="replace")
    for r in rules:
        if r[1:3] == [str(key), client]:
            rules.remove(r)
            print("request", key, "of", client, "has come", flush=True)
            if r[0] == "hang-at":
                hung.add(client)
            return r, client
    return None, client


async def held(who):
    if mode[0] == "delay":
        await asyncio.sleep(int(mode[1]) / 1000)
    while mode[0] == "hang" or who[0] in hung:
        await asyncio.sleep(0.1)


async def requests(reader, writer, client_writer, who):
    """Client to broker, a request at a time."""
    try:
        while True:
            head = await reader.readexactly(4)
            frame = head + await reader.readexactly(struct.unpack(">I", head)[0])
            rule, who[0] = rule_for(frame)
            if rule and rule[0] == "late":
                await asyncio.sleep(int(rule[3]) / 1000)
            await held(who)
            if rule and rule[0] == "lose":
                client_writer.close()
            writer.write(frame)
            await writer.drain()
            if rule and rule[0] != "hang-at":
                print("and has gone to the broker", flush=True)
                await asyncio.sleep(1)          # for the broker to read it before the end
    except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def answers(reader, writer, who):
    try:
        while data := await reader.read(65536):
            await held(who)
            writer.write(data)
            await writer.drain()
    except (OSError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def serve(listen, target):
    async def accept(reader, writer):
        met[0] += 1
        if mode[0] == "cut":
            writer.close()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        who = [None]                            # client.id, once the first request has come
        writers.update((writer, up_writer))
        await asyncio.gather(requests(reader, up_writer, writer, who),
                             answers(up_reader, writer, who))
        writers.difference_update((writer, up_writer))

    server = await asyncio.start_server(accept, "127.0.0.1", listen)
    async with server:
        await server.serve_forever()


async def main():
    pairs = [tuple(map(int, p.split(":"))) for p in sys.argv[2:]]
    await asyncio.gather(watch(sys.argv[1]), *(serve(*p) for p in pairs))


asyncio.run(main())
