# SPDX-License-Identifier: Apache-2.0
"""What was generated twice in a chaos run, and why.

  work.py BOOTSTRAP GROUP RUN INTERVAL_MS ATTEMPTS MODE LONG
      MODE is at-least-once or exactly-once. RUN is the run's folder: `faults.log` (what
      befell whom, when) and a log of each worker process, `worker-NAME.N.log`, whose debug lines
      say when a prompt entered the engine and when it was generated. A line is one write(), so
      SIGKILL takes none back: a generation is counted whether or not anything of it was sent.
      How much 3 and 4 had to judge is printed; LONG is 1 for a run in which that must not be nothing.

  work.py try FOLDER
      judges logs that are made up, to show that checks 3, 4 and 5 can fail.

All stamps are of one machine's clock. The truth about progress is the group's own history: every
offset and map that was ever committed, read from __consumer_offsets with read_committed; no segment
of it grows old enough to be compacted in a run.

A process holds a partition from its line "assigned" until it dies, says "lost" or "revoked", or
another process says "assigned", whichever is first: a process that was stopped, or cut off, learns
late that the group has gone on without it. That is its tenure; of one that dies while it drains what
is revoked, until it dies. Held at its end: what it had put into the engine and the group's offsets
did not cover.

  1. Of the generations of a prompt at most one is without excuse. An excuse: the tenure ended
     before the prompt's progress was committed.
  2. No prompt enters an engine after its progress was committed, in a tenure that goes on. (This is
     what the offset map is for: it fails when maps are not written, not read, or not believed.)
  3. An orderly end (revoked, SIGTERM) gives nothing finished back, unless the brokers were away.
  4. What was generated again because its process was killed had been finished for at most one commit
     interval, and a second for a busy machine's brokers to answer, unless the brokers were away. At
     least once and in the classic protocol a member can commit nothing between its JoinGroup and
     the group's answer (docs/chaos.md), so that time is not counted, of each join JOIN at most. It
     is what the client's own log says, state by state. A failure prints whose prompts they were,
     and what that log said of commits and of the group in the seconds before.
  5. A prompt that kills nobody is a dead letter `poison` only if, between the time it was written and
     its dead letter, the last ATTEMPTS owners of its partition that did not give it back in order died
     or were thrown out, and two of them while it ran alone in their engine (what worker/quarantine.h
     and journal.h promise; RUN/condemned.jsonl names such prompts). ATTEMPTS=0: none.

So an aborted transaction, a broker that dies, a slow network repeat nothing, and what deaths and
losses repeat is part of what was held at each; both sums are printed, by cause:

  killed, failed    the process died: SIGKILL, or status 1
  lost              it was stopped or cut off, and the group went on without it
  revoked, ended    in order: a rebalance, SIGTERM
"""
import calendar
import collections
import glob
import json
import os
import re
import struct
import sys
import time

from confluent_kafka import KafkaError, TopicPartition

from chaos import client, decode_map, say, varint

FOREVER = float("inf")
CLOCK = 0.005           # stamps have milliseconds
ANSWER = 1              # seconds: of a commit, on a busy machine
DRAIN = 3               # seconds: revoke.drain_ms of the workers, and a commit
JOIN = 6                # seconds: the session of one that died (3) and a drain, before all have joined
CLOSING = 1             # seconds: until intake has heard that nothing more may enter the engine
RECOVERY = 10           # seconds: kafka.socket.timeout.ms of the workers
STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{3})Z (\w+ +\[[^]]*\] \w+): (.*)")
FAILS = re.compile(r"ERROR .* worker$")
WORK = re.compile(r"prompts \[(\d+)\] @(\d+) (runs|is generated)$")
ALONE = re.compile(r"prompts \[(\d+)\] @(\d+) runs alone: ")
OWNS = re.compile(r"(assigned|revoked|lost) prompts \[(\d+)\]")
JOINS = re.compile(r"CGRPJOINSTATE: .* changed join state (\S+) -> (\S+) ")
JOINING = ("wait-join", "wait-metadata", "wait-sync")      # the second before the first is no join yet
TELLS = re.compile(r"offset commit|committed offsets|CGRPJOINSTATE|(assigned|revoked|lost) prompts")


# ---- the group's history -----------------------------------------------------------------------

def read_commit(key, value):
    """(group, partition, offset, map, when) of a record in __consumer_offsets; None: another kind.
    From Kafka's OffsetCommitKey.json and OffsetCommitValue.json."""
    if not key or not value or struct.unpack_from(">h", key)[0] > 1:
        return None
    at, text = 2, []
    for _ in range(2):
        n, = struct.unpack_from(">h", key, at)
        text.append(key[at + 2:at + 2 + n].decode())
        at += 2 + n
    partition, = struct.unpack_from(">i", key, at)
    version, offset = struct.unpack_from(">hq", value)
    at = 10 + (4 if version >= 3 else 0)        # the leader's epoch
    if version >= 4:                            # a compact string
        n, at = varint(value, at)
        n -= 1
    else:
        n, = struct.unpack_from(">h", value, at)
        at += 2
    metadata = value[at:at + n].decode()
    when, = struct.unpack_from(">q", value, at + n)
    return text[0], text[1], partition, offset, metadata, when / 1000


def first_covered(bootstrap, group):
    """{(partition, offset): when progress was first committed}, and the number of commits."""
    c = client(bootstrap, "oracle", **{"enable.partition.eof": True})
    topic = "__consumer_offsets"
    left = set(c.list_topics(topic, timeout=20).topics[topic].partitions)
    c.assign([TopicPartition(topic, p, 0) for p in left])
    covered, upto, commits, stop = {}, collections.defaultdict(int), 0, time.time() + 120
    while left:
        assert time.time() < stop, "the group's history can't be read"
        for m in c.consume(5000, timeout=0.5):
            if m.error():
                left -= {m.partition()} if m.error().code() == KafkaError._PARTITION_EOF else set()
                continue
            commit = read_commit(m.key(), m.value())
            if not commit or commit[:2] != (group, "prompts"):
                continue
            _, _, p, offset, metadata, when = commit
            commits += 1
            for o in range(upto[p], offset):
                covered.setdefault((p, o), when)
            upto[p] = max(upto[p], offset)
            for o in decode_map(metadata, offset):
                covered.setdefault((p, o), when)
    c.close()
    return covered, commits


# ---- the processes -------------------------------------------------------------------------------

class Tenure:
    def __init__(self, process, partition, start):
        self.process, self.partition, self.start = process, partition, start
        self.end, self.cause = FOREVER, None        # as the process knew it
        self.over = FOREVER                         # as the group knew it
        self.runs, self.done = {}, collections.defaultdict(list)    # offset: when
        self.turns = []                             # of prompts that were to run alone

    def alone(self):
        """The prompts that had the engine for themselves when the tenure was over."""
        return {x.offset for x in self.turns if x.since <= self.over + CLOCK and x.until > self.over}


class Turn:
    """Of a prompt that is to run alone. It lasts until another one enters the engine: only then has
    the group been told (worker/isolation.c)."""

    def __init__(self, partition, offset, since):
        self.partition, self.offset, self.since, self.until = partition, offset, since, FOREVER

    def of(self, partition, offset):
        return (self.partition, self.offset) == (partition, offset)


class Process:
    def __init__(self, path):
        self.name = os.path.basename(path)[len("worker-"):-len(".log")]
        self.tenures, self.end, self.failing = [], FOREVER, False
        self.joins, self.told = [], []              # (from, to); (when, line)
        self.turn = None
        held = {}
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                if m := STAMP.match(line):
                    when = calendar.timegm(time.strptime(m[1], "%Y-%m-%dT%H:%M:%S")) + int(m[2]) / 1000
                    self.failing = self.failing or bool(FAILS.match(m[3]))
                    self.take(when, m[4], held)

    def take(self, when, text, held):
        if TELLS.search(text):
            self.told.append((when, text))
        if m := JOINS.search(text):
            self.join(when, m[2])
        elif m := WORK.match(text):
            t = held.get(int(m[1]))
            if m[3] == "runs":
                self.enters(when, int(m[1]), int(m[2]))
            if t and m[3] == "runs":
                t.runs.setdefault(int(m[2]), when)
            elif t:
                t.done[int(m[2])].append(when)
        elif m := ALONE.match(text):
            if t := held.get(int(m[1])):
                self.begin_turn(when, t, int(m[2]))
        elif m := OWNS.match(text):
            p = int(m[2])
            if m[1] == "assigned":
                held[p] = Tenure(self, p, when)
                self.tenures.append(held[p])
            elif p in held and held[p].end == FOREVER:
                held[p].end, held[p].cause = when, "failed" if self.failing else m[1]

    def begin_turn(self, when, tenure, offset):
        if self.turn and self.turn.of(tenure.partition, offset):
            return                                  # its journal and the group say so both
        if self.turn:
            self.turn.until = when
        self.turn = Turn(tenure.partition, offset, when)
        tenure.turns.append(self.turn)

    def enters(self, when, partition, offset):
        if self.turn and not self.turn.of(partition, offset) and when > self.turn.since + CLOSING:
            self.turn.until, self.turn = when, None

    def join(self, when, state):
        under_way = self.joins and self.joins[-1][1] == FOREVER
        if state == JOINING[0] and not under_way:
            self.joins.append((when, FOREVER))
        elif state not in JOINING and under_way:
            self.joins[-1] = self.joins[-1][0], when

    def joined(self, begin, end):
        """For how long of that time it could not commit, because it joined its group."""
        return sum(max(0, min(end, b, a + JOIN) - max(begin, a)) for a, b in self.joins)

    def ended(self, when, cause):
        self.end = when
        for t in self.tenures:
            draining = t.cause == "revoked" and cause == "killed" and when - t.end < DRAIN
            if t.end == FOREVER or draining:
                t.end, t.cause = when, cause


def read_faults(run, processes):
    """Ends the processes that ended. Returns when brokers or network went and came."""
    marks = []
    with open(f"{run}/faults.log", encoding="utf-8") as f:
        for line in f:
            when, text = line.rstrip("\n").split(" ", 1)
            m = re.match(r"worker (\w+\.\d+) (was killed|ended with status (\d+))", text)
            if m and processes[m[1]].end == FOREVER:
                processes[m[1]].ended(float(when), "killed" if m[2] == "was killed" else
                                      "ended" if m[3] == "0" else "failed")
            elif text in ("trouble", "calm"):
                marks.append((float(when), text == "trouble"))
    return marks


def read_run(run):
    """Every worker process; every partition's tenures, in time; when brokers or network were away."""
    processes = {p.name: p for p in map(Process, glob.glob(f"{run}/worker-*.log"))}
    marks = read_faults(run, processes)
    by_partition = collections.defaultdict(list)
    for p in processes.values():
        for t in p.tenures:
            by_partition[t.partition].append(t)
    for tenures in by_partition.values():
        tenures.sort(key=lambda t: t.start)
        for i, t in enumerate(tenures):
            later = [n.start for n in tenures[i + 1:] if n.start > t.start]
            # A revoked partition is still drained and committed; the next owner waits for that.
            own = t.end if t.cause != "revoked" else t.process.end
            t.over = min([own] + later[:1])
    return processes, by_partition, troubles(marks)


def troubles(marks):
    """[(from, to)]: while a broker or the network was away, and what they need to be themselves."""
    spans, depth, begun = [], 0, 0
    for when, more in sorted(marks):
        if more and not depth:
            begun = when
        depth += 1 if more else -1
        if not depth:
            spans.append((begun, when + RECOVERY))
    return spans + ([(begun, FOREVER)] if depth else [])


# ---- judging -------------------------------------------------------------------------------------

BADLY, ORDERLY = ("killed", "failed", "lost"), ("revoked", "ended")
CAUSES = BADLY + ORDERLY


class Verdict:
    """Everything about prompts that were in flight, or generated, in some tenure."""

    def __init__(self, covered, by_partition, trouble, mode, limit):
        self.covered, self.trouble, self.mode, self.limit = covered, trouble, mode, limit
        self.held, self.repeated = collections.Counter(), collections.Counter()
        self.judged = collections.defaultdict(list)  # cause: tenure of each generation, see could_fail
        self.oldest = [0, 0]                        # at a kill: in calm, in trouble
        self.waited, self.in_join = 0, 0            # of the first without joins; finished in joins
        self.old = []                               # (waited, when, prompt, tenure): in calm
        self.inexcusable, self.late, self.given_back = [], [], []
        self.generations = collections.defaultdict(list)    # prompt: [(when, tenure)]
        for p, tenures in by_partition.items():
            for t in tenures:
                self.look_at(p, t)
        for prompt, times in sorted(self.generations.items()):
            if len(times) > 1:
                self.excuse(prompt, times)

    def progress(self, prompt):
        return self.covered.get(prompt, FOREVER)

    def troubled(self, when, t):
        """Were brokers or network away between then and the tenure's end?"""
        return any(a < min(t.over, t.end + 60) and b > when for a, b in self.trouble)

    def joined(self, when, t):
        return t.process.joined(when, t.over) if self.mode == "at-least-once" else 0

    def could_fail(self, when, t):
        """Would it fail check 3 or 4, had it been generated again?"""
        if when >= t.over or self.troubled(when, t):
            return False
        return t.cause in ORDERLY or \
            t.cause == "killed" and t.over - when - self.joined(when, t) > self.limit

    def look_at(self, p, t):
        for o, when in t.runs.items():
            at = self.progress((p, o))
            if t.cause and at > t.over:
                self.held[t.cause] += 1
            when = min([when] + t.done.get(o, []))  # it may be done before it is said to run
            if at + CLOCK < when < t.over:
                self.late.append(f"prompts [{p}] @{o} ran in {t.process.name} {when - at:.3f} s after "
                                 "its progress was committed")
        for o, times in t.done.items():
            self.generations[(p, o)] += [(when, t) for when in times]
            self.judged[t.cause] += [t for when in times if self.could_fail(when, t)]
            if len(times) > 1:
                self.inexcusable.append(f"prompts [{p}] @{o}: {len(times)} times by {t.process.name}, "
                                        "which held the partition all the while")

    def excuse(self, prompt, times):
        what, without = f"prompts [{prompt[0]}] @{prompt[1]}", 0
        for when, t in times:
            if not t.cause or self.progress(prompt) <= t.over:
                without += 1
                continue
            self.repeated[t.cause] += 1
            troubled = self.troubled(when, t)
            if t.cause == "killed":
                self.oldest[troubled] = max(self.oldest[troubled], t.over - when)
                if not troubled:
                    joined = self.joined(when, t)
                    self.old.append((t.over - when - joined, when, prompt, t))
                    self.waited = max(self.waited, t.over - when - joined)
                    self.in_join += joined > 0
            if t.cause in ORDERLY and not troubled:
                self.given_back.append(f"{what} was generated and then given back by {t.process.name}")
        if without > 1:
            self.inexcusable.append(f"{what} by " + ", ".join(
                f"{t.process.name} ({t.cause or 'held'})" for _, t in times))

    def judged_of(self, *causes):
        """How many generations before how many ends of processes: in calm, see could_fail."""
        tenures = [t for c in causes for t in self.judged[c]]
        return len(tenures), len({t.process for t in tenures})


def dead_owners(tenures, written, condemned):
    """Who held the partition, in order, and left it as the dead do: of those that a prompt may be
    suspected for which was written then and condemned then. The next owner suspects what it finds
    there, or is written before it looks; who takes over from itself suspects nothing."""
    found = []
    for t, heir in zip(tenures, tenures[1:]):
        if t.cause in BADLY and t.over <= condemned and heir.start <= condemned and \
                heir.over >= written and heir.process is not t.process:
            found.append(t)
    return found


def unproven(run, by_partition, attempts):
    """Of the innocent that were condemned: how many there are, and those for which the deaths that
    the worker's documentation asks for did not happen before."""
    with open(f"{run}/condemned.jsonl", encoding="utf-8") as f:
        condemned = list(map(json.loads, f))
    bad = []
    for i, p, o, written, when in condemned:
        deaths = dead_owners(by_partition[p], written, when)
        alone = {t.process.name for t in deaths if o in t.alone()}
        if not attempts or len(deaths) < attempts or len(alone) < 2:
            bad.append(f"{i}, prompts [{p}] @{o}, condemned at {clock(when)}: {len(deaths)} owners "
                       f"had died since it was written, while it was alone: {sorted(alone)}")
    return len(condemned), bad


def report(v, by_partition, interval_ms):
    ends = collections.Counter(t.cause for x in by_partition.values() for t in x)
    for c in CAUSES:
        print(f"# {c}: {ends[c]} tenures of a partition, {v.held[c]} prompts in flight at their ends, "
              f"{v.repeated[c]} of them finished and generated again")
    print(f"# at a kill the oldest of that had been finished for {v.oldest[0]:.1f} s, or "
          f"{v.oldest[1]:.1f} s where brokers or network were away; {interval_ms} ms between commits")
    joins = [b - a for p in {t.process for x in by_partition.values() for t in x}
             for a, b in p.joins if b < FOREVER]
    print(f"# of the first {v.in_join} while their worker joined its group; without that time the oldest "
          f"for {v.waited:.1f} s; {len(joins)} joins, {sum(joins):.0f} s, the longest {max(joins, default=0):.1f} s")
    for bad in (v.inexcusable, v.late, v.given_back):
        for line in bad[:5]:
            print("#", line)


def clock(when):
    return time.strftime("%H:%M:%S", time.gmtime(when)) + f".{int(when * 1000) % 1000:03d}"


def explain(v, limit):
    """Of what was finished for longer than that: whose it was, and what its worker's log said."""
    by_tenure = collections.defaultdict(list)
    for waited, when, prompt, t in v.old:
        if waited > limit:
            by_tenure[t].append((when, prompt[1], waited))
    told = set()
    for t, late in by_tenure.items():
        late.sort()
        print(f"# worker {t.process.name}, prompts [{t.partition}], its since {clock(t.start)}, killed "
              f"at {clock(t.over)}: {len(late)} prompts, the first @{late[0][1]}, finished at "
              f"{clock(late[0][0])}; without joins {max(x[2] for x in late):.1f} s before")
        if t.process in told:
            continue
        told.add(t.process)
        for when, text in t.process.told:
            if late[0][0] - 2 < when <= t.over:
                print(f"#   {clock(when)} {text[:150]}")


def judge(bootstrap, group, run, interval_ms, attempts, mode, long):
    covered, commits = first_covered(bootstrap, group)
    processes, by_partition, trouble = read_run(run)
    limit = float(interval_ms) / 1000 + ANSWER
    v = Verdict(covered, by_partition, trouble, mode, limit)
    work, held = sum(map(len, v.generations.values())), sum(v.held.values())
    again = work - len(v.generations)
    print(f"# {work} generations of {len(v.generations)} prompts by {len(processes)} processes; "
          f"{commits} commits of a partition's offset")
    report(v, by_partition, interval_ms)
    explain(v, limit)
    at_kills, kills = v.judged_of("killed")
    in_order, ends = v.judged_of(*ORDERLY)
    print(f"# judged, with brokers and network well: {at_kills} generations that were older than that "
          f"at {kills} kills, {in_order} before {ends} processes gave something back")
    condemned, rashly = unproven(run, by_partition, int(attempts))
    turns = sum(len(t.turns) for x in by_partition.values() for t in x)
    ends_alone = sum(v.progress((p, o)) > t.over for p, x in by_partition.items() for t in x
                     if t.cause in BADLY for o in t.alone())
    print(f"# {turns} turns of prompts that were to run alone, {ends_alone} of them unfinished when "
          "their worker died")
    for line in rashly[:5]:
        print("#", line)
    good = [say(work and commits, "the workers' logs and the group's history are there"),
            say(again <= held, f"{again} prompts were generated twice, of {held} in flight when "
                "their partition or their process went"),
            say(not v.inexcusable, f"each of them was one of those ({len(v.inexcusable)} were not)"),
            say(v.waited <= limit, "at a kill none of them had been finished for more than "
                f"{interval_ms} ms and {ANSWER} s ({at_kills} generations, {kills} kills)"),
            say(not v.late, f"nothing ran whose progress was committed ({len(v.late)} did)"),
            say(not v.given_back, "an orderly end gives nothing finished back "
                f"({len(v.given_back)} of {in_order} given back)"),
            say(not rashly, f"of {condemned} prompts that were taken for poison each was alone with "
                f"two deaths ({len(rashly)} were not)")]
    if int(long):
        good += [say(kills and ends, f"there were kills and orderly ends to judge ({kills}, {ends})")]
    return 0 if all(good) else 1


# ---- can it fail? --------------------------------------------------------------------------------

STATE = 'kafka: CGRPJOINSTATE: [thrd:main]: Group "chaos" changed join state {} -> {} (state up)'
TAKES = "consumer: assigned prompts [0] at 0"


def made_up(folder, logs, faults):
    """A run of these log lines, {process: [(when, text)]}, and faults, [(when, text)]."""
    def line(at, text):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
        return f"{stamp}.{round(at % 1 * 1000):03d}Z DEBUG [w] {text}\n"
    for old in glob.glob(f"{folder}/worker-*.log"):
        os.remove(old)
    for name, lines in logs.items():
        with open(f"{folder}/worker-{name}.log", "w", encoding="utf-8") as f:
            f.writelines(line(at, text) for at, text in sorted(lines))
    with open(f"{folder}/faults.log", "w", encoding="utf-8") as f:
        f.writelines(f"{at} {text}\n" for at, text in faults)
    return read_run(folder)[1:]


def two_workers(folder, done, end, faults, *more):
    """a.1 generates a prompt when `done`, commits nothing and ends; b.1 generates it again."""
    mine = [(0, TAKES), (done, "outbox: prompts [0] @1 is generated"), *more]
    by_partition, trouble = made_up(folder, {"a.1": mine, "b.1": [
        (end + 1, TAKES), (end + 2, "outbox: prompts [0] @1 is generated")]}, faults)
    return {mode: Verdict({(0, 1): end + 3}, by_partition, trouble, mode, 1.5)
            for mode in ("at-least-once", "exactly-once")}


def try_kills(folder):
    into, out = ("init", "wait-join"), ("wait-sync", "wait-assign-call")
    tried = (((10, 12.6), 2.6, 2.6, "what was finished long before a kill is found"),
             ((10, 12.6, (9, *into), (9.5, *out)), 2.6, 2.6, "also after a join"),
             ((10, 12.6, (10.2, *into)), 0.2, 2.6, "the time of a join is not counted, at least once"),
             ((10, 12.6, (10, *into), (11, *out)), 1.6, 2.6, "no other time is left out"),
             ((10, 12.6, (10, "init", "wait-metadata")), 2.6, 2.6, "nor what precedes a join"),
             ((10, 18.6, (10, *into)), 2.6, 8.6, f"and of a longer one {JOIN} s"))
    good = True
    for (done, killed, *states), least, exactly, text in tried:
        was = two_workers(folder, done, killed, [(killed, "worker a.1 was killed")],
                          *((at, STATE.format(*change)) for at, *change in states))
        good &= say(all(abs(v.waited - want) < CLOCK and v.judged_of("killed") == (want > 1.5,) * 2
                        for v, want in zip(was.values(), (least, exactly))), text)
    return good


def try_calm(folder):
    """What was judged is counted, what happened amid trouble is not judged."""
    def judged(done, *faults):
        v = two_workers(folder, done, 40, [*faults])["exactly-once"]
        return [*v.judged_of("killed"), *v.judged_of(*ORDERLY), v.waited > 0, len(v.given_back)]
    killed, ended = (40, "worker a.1 was killed"), (40, "worker a.1 ended with status 0")
    away, young = ((5, "trouble"), (25, "calm")), 39
    return say(judged(36, killed) == judged(36, *away, killed) == [1, 1, 0, 0, 1, 0] and
               judged(34, *away, killed) == [0, 0, 0, 0, 0, 0] and
               judged(young, killed) == [0, 0, 0, 0, 1, 0],
               "a kill that judges nothing, amid trouble or too soon, is not counted") & \
        say(judged(36, ended) == judged(36, *away, ended) == [0, 0, 1, 1, 0, 1] and
            judged(34, *away, ended) == [0] * 6,
            "what an orderly end gives back is found, and amid trouble not judged")


def try_poison(folder):
    """Three owners of a partition die, the last two with prompt 1 alone; the fourth condemns it."""
    runs = "intake: prompts [0] @{} runs"
    alone = "consumer: prompts [0] @{} runs alone: 2 workers went"

    def rashly(written=1, condemned=35, second=(), third=(), how="was killed", attempts=3):
        logs = {"a.1": [(0, TAKES), (1, runs.format(1))], "d.1": [(30, TAKES)],
                "b.1": [(10, TAKES), (11, alone.format(1)), *second],
                "c.1": [(20, TAKES), (21, alone.format(1)), *third]}
        faults = [(8, "worker a.1 was killed"), (18, f"worker b.1 {how}"), (28, "worker c.1 was killed")]
        by_partition, _ = made_up(folder, logs, faults)
        with open(f"{folder}/condemned.jsonl", "w", encoding="utf-8") as f:
            f.write(json.dumps(["c-1", 0, 1, written, condemned]) + "\n")
        return len(unproven(folder, by_partition, attempts)[1])

    others = (15, runs.format(2)), (25, runs.format(2))
    late = [(11.5, runs.format(2)), (13, runs.format(1))]
    return say(not rashly() and not rashly(second=late),
               "who was alone at two deaths of three is rightly taken for poison") & \
        say(all((rashly(condemned=27), rashly(condemned=29), rashly(written=19.5))),
            "not for a death after its dead letter, or before it was written") & \
        say(rashly(attempts=4), "nor for one less than it takes") & \
        say(all((rashly(how="ended with status 0"), rashly(attempts=0))), "nor for an orderly end") & \
        say(all((rashly(second=others[:1]), rashly(third=others[1:]),
                 rashly(third=[(23, alone.format(3))]))), "nor if it was not alone any more")


def try_it(folder):
    os.makedirs(folder, exist_ok=True)
    return 0 if try_kills(folder) & try_calm(folder) & try_poison(folder) else 1


if __name__ == "__main__":
    sys.exit(try_it(sys.argv[2]) if sys.argv[1] == "try" else judge(*sys.argv[1:]))
