"""How fast totals go to Stripe, and what that costs: stage 2 on the Kafka store, beside the bare client of Stripe.

``python -m benchmarks.deliver`` starts a broker and, for each run, a stand-in for Stripe, a process of its own that
takes 0.3 s for an answer and allows 1,000 Meter Events a second. Then in turn

    the client   Stripe's own asynchronous client sends as many events a second, and does nothing else
    stage 2      ``tallyman run --stage deliver``, a process with everything as it is by default, sends a backlog

The backlog lies in a transaction of the totals log that is open until the process has taken its partitions over.
Measured are the events that the stand-in takes, how often it says 429, and the CPU time of the sending process, all
threads, user and system, from the first event to the last. Reported are medians of interleaved rounds.

``--rate 1200 --allowed 1400`` leaves both limits out of it: how fast can it be? ``--allowed 600`` is a Stripe that
takes less than is configured: how long does a backlog take, and how many 429s?
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import stripe

from benchmarks.running import cpu_of, hidden, until
from consumer.runtime.stripe import API_VERSION, CONNECTIONS
from consumer.sandbox.kafka import LocalKafka, free_ports
from consumer.storage import Stage
from consumer.storage.kafka_records import partition_of
from consumer.storage.kafka_topics import Topics
from consumer.totals import Destination, Total, encode

EVENT_NAME: Final = "ai_tokens"
KEY: Final = "sk_test_benchmark"
PARTITIONS: Final = 12
CUSTOMERS: Final = 5_000
LATENCY_S: Final = 0.3
RATE: Final = 1_000
TARGET: Final = 0.5
"""Of a core, at RATE."""
LOOK_S: Final = 0.25
PATIENCE_S: Final = 30.0


class Run(NamedTuple):
    """What one run came to."""

    events: int
    wall: float
    """Seconds from the first event to the last."""
    cpu: float
    """Seconds of the sending process in that time."""
    limited: int
    """Answers that said 429."""

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.wall

    @property
    def cost(self) -> float:
        """CPU milliseconds for an event."""
        return self.cpu / self.events * 1000


# Stripe


class StandIn:
    """The stand-in, as a process."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stats(self) -> dict[str, int]:
        """What it has answered, by kind."""
        with urllib.request.urlopen(f"{self.url}/_sandbox/stats", timeout=30) as answer:  # noqa: S310 - our own page
            stats: dict[str, int] = json.load(answer)
        return stats

    def watch(self, events: int, cpu: Callable[[], float], what: str) -> Run:
        """From the first event that it takes until it has taken all of them."""
        until(lambda: self.stats().get("accepted", 0) > 0, f"{what} sends", patience_s=PATIENCE_S)
        before, first, began = cpu(), self.stats().get("accepted", 0), time.perf_counter()
        accepted, deadline = first, began + PATIENCE_S
        while accepted < events:
            time.sleep(LOOK_S)
            if (now := self.stats()["accepted"]) > accepted:
                accepted, deadline = now, time.perf_counter() + PATIENCE_S
            elif time.perf_counter() > deadline:
                raise TimeoutError(f"{what} does not go on: {self.stats()}")
        took, used, stats = time.perf_counter() - began, cpu() - before, self.stats()
        if (wrong := stats["accepted"] - events + stats.get("duplicate", 0)) != 0:
            raise RuntimeError(f"{what} sent {wrong} events more than there are: {stats}")
        return Run(events - first, took, used, stats.get("rate_limited", 0))


@contextmanager
def stand_in(allowed: int) -> Iterator[StandIn]:
    """One that takes so many events a second, and takes its time."""
    faults = json.dumps({"latency": [LATENCY_S, LATENCY_S]})
    options = ["--any-customer", "--meter", EVENT_NAME, "--key", KEY, "--endpoint-rate", str(allowed)]
    command = [sys.executable, "-m", "consumer.sandbox.stripe", *options, "--faults", faults]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise RuntimeError("it has no output")
        yield StandIn(process.stdout.readline().strip())
    finally:
        process.terminate()
        process.wait(30)


# The events


def totals(number: int, pipeline: str) -> Iterator[Total]:
    """So many totals of the last minutes; in each minute every customer has one."""
    now = int(time.time()) // 60 * 60
    minutes = -(-number // CUSTOMERS)
    for position in range(number):
        minute, customer = divmod(position, CUSTOMERS)
        start = now - (minutes - minute) * 60
        yield Total(
            identifier=f"tm1-{start}-1m-r0-{position:040x}",
            pipeline=pipeline,
            meter="ai-tokens",
            edition="benchmark",
            partition=position % PARTITIONS,
            window_start=start,
            window="1m",
            revision=0,
            due=(start + 180) * 1000,
            customer=f"cus_{customer:014d}",
            value=f"{18_000 + position}.25",
            events=312,
            timestamp=start + position % 60,
            first_offset=position * 300,
            last_offset=position * 300 + 311,
            stripe=Destination(EVENT_NAME),
        )


# Stage 2


class Sender:
    """The process whose CPU time counts."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        environment = os.environ | {"STRIPE_SECRET_KEY": KEY}
        with log.open("wb") as out:
            self._process = subprocess.Popen([sys.executable, "-m", *command], stdout=out, stderr=out, env=environment)

    def cpu(self) -> float:
        """Seconds that it has used so far: all of its threads, user and system."""
        return cpu_of(self._process.pid)

    def said(self, what: str) -> bool:
        """Whether it has; raises where it has ended without."""
        log = self._log.read_text()
        if what not in log and self._process.poll() is not None:
            raise RuntimeError(f"the process has ended:\n{log[-3000:]}")
        return what in log

    def stop(self) -> None:
        """In good order."""
        self._process.terminate()
        self._process.wait(30)


def deliver(kafka: LocalKafka, pipeline: str, events: int, allowed: int, rate: int) -> Run:
    """Stage 2 sends a backlog."""
    kafka.create_topic(pipeline, PARTITIONS, arrival="create_time")
    with tempfile.TemporaryDirectory() as folder, stand_in(allowed) as stripe_:
        file = Path(folder, "tallyman.yaml")
        file.write_text(json.dumps(config(kafka, pipeline, stripe_.url, rate)))
        sender = Sender(["consumer", "run", "-c", str(file), "--stage", str(Stage.DELIVER)], Path(folder, "log"))
        try:
            until(lambda: sender.said("started"), "stage 2 has taken all partitions over", patience_s=PATIENCE_S)
            with hidden(kafka, pipeline, backlog(pipeline, events), patience_s=PATIENCE_S) as show:
                show()
                return stripe_.watch(events, sender.cpu, "stage 2")
        finally:
            sender.stop()


def backlog(pipeline: str, events: int) -> Iterator[dict[str, Any]]:
    """What the totals log is to hold."""
    topic = Topics.of(pipeline).totals
    for total in totals(events, pipeline):
        key = total.customer.encode()
        yield {"topic": topic, "value": encode(total), "key": key, "partition": partition_of(key, PARTITIONS)}


def config(kafka: LocalKafka, pipeline: str, url: str, rate: int) -> dict[str, Any]:
    """What stage 2 runs on: everything else as it is by default."""
    port, _ = free_ports()
    return {
        "pipeline": pipeline,
        "bill_from": f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}T00:00:00Z",
        "kafka": {"bootstrap_servers": kafka.bootstrap_servers, "topic": pipeline, "arrival": "create_time"},
        "storage": {"kind": "kafka"},
        "meters": [
            {
                "name": "ai-tokens",
                "event_types": ["ai.completion"],
                "aggregation": "sum",
                "value": "$.tokens.total",
                "stripe": {"event_name": EVENT_NAME},
            }
        ],
        "stripe": {"livemode": False, "api_base": url, "max_rate": rate},
        "http": {"host": "127.0.0.1", "port": port},
    }


# Stripe's client


def bare(events: int) -> Run:
    """Stripe's own client sends the same events; nothing is asked of it but that, so nothing is refused."""
    with tempfile.TemporaryDirectory() as folder, stand_in(2 * RATE) as stripe_:
        sender = Sender(["benchmarks.deliver", "--child", stripe_.url, "--events", str(events)], Path(folder, "log"))
        try:
            return stripe_.watch(events, sender.cpu, "the client")
        finally:
            sender.stop()


async def client(url: str, events: int) -> None:
    """What runs in that process: a hundredth of a second's events every hundredth of a second."""
    stripe.enable_telemetry = False
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS))
    free = asyncio.Semaphore(CONNECTIONS)
    sdk = stripe.StripeClient(
        KEY,
        stripe_version=API_VERSION,
        base_addresses={"api": url},
        max_network_retries=0,
        http_client=stripe.AIOHTTPClient(session=session),
    )

    async def send(total: Total) -> None:
        await sdk.v1.billing.meter_events.create_async(
            {
                "event_name": total.stripe.event_name,
                "payload": {"stripe_customer_id": total.customer, "value": total.value},
                "identifier": total.identifier,
                "timestamp": total.timestamp,
            },
            {"idempotency_key": total.identifier},
        )

    made, sending = list(totals(events, "bare")), set()
    began = time.perf_counter()
    for number, total in enumerate(made):
        if (ahead := number / RATE - (time.perf_counter() - began)) > 0:
            await asyncio.sleep(max(ahead, 0.01))
        await free.acquire()
        sending.add(task := asyncio.create_task(send(total)))
        task.add_done_callback(sending.discard)
        task.add_done_callback(lambda _: free.release())
    await asyncio.gather(*sending)
    await asyncio.Event().wait()


# What comes of it


def report(runs: Mapping[str, list[Run]]) -> None:
    """The table, and the one figure that counts."""
    median = {
        name: {key: statistics.median(getattr(run, key) for run in each) for key in ("rate", "cost", "limited")}
        for name, each in runs.items()
    }
    print(f"\n{'':12}{'events/s':>10}{'CPU ms an event':>18}{'of a core at 1,000/s':>22}{'429s':>8}")
    for name, each in median.items():
        print(f"{name:12}{each['rate']:>10,.0f}{each['cost']:>18.3f}{each['cost']:>22.0%}{each['limited']:>8.0f}")
    if len(runs) > 1:
        ratios = [whole.cost / bare.cost for bare, whole in zip(*runs.values(), strict=True)]
        print(
            f"\nstage 2 takes {statistics.median(ratios):.2f} times the CPU time of the client alone (rounds: "
            f"{min(ratios):.2f} to {max(ratios):.2f}); less than {TARGET:.0%} of a core is wanted"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--allowed", type=int, default=RATE, help="events a second that Stripe takes")
    parser.add_argument("--rate", type=int, default=RATE, help="events a second that stage 2 is configured to send")
    parser.add_argument("--only", choices=("the client", "stage 2"), help="measure this one alone")
    parser.add_argument("--child", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        asyncio.run(client(arguments.child, arguments.events))
        return
    candidates: dict[str, Callable[[LocalKafka], Run]] = {
        "stage 2": lambda kafka: deliver(
            kafka, f"deliver-{next(names)}", arguments.events, arguments.allowed, arguments.rate
        )
    }
    if arguments.allowed >= RATE:
        candidates = {"the client": lambda _: bare(arguments.events)} | candidates
    if arguments.only:
        candidates = {arguments.only: candidates[arguments.only]}
    runs: dict[str, list[Run]] = {name: [] for name in candidates}
    names = count()
    with LocalKafka() as kafka:
        for number in range(arguments.rounds):
            for name, run in candidates.items():
                runs[name].append(done := run(kafka))
                print(
                    f"round {number + 1}: {name} sent {done.events:,} events in {done.wall:.1f} s, {done.rate:,.0f}/s, "
                    f"with {done.cpu:.1f} s of CPU and {done.limited} times 429 (load {os.getloadavg()[0]:.1f})",
                    flush=True,
                )
    report(runs)


if __name__ == "__main__":
    main()
