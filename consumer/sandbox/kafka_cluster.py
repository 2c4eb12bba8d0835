"""Several Kafka brokers on this machine, of which one at a time may be missing."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import ElectionType, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from consumer.sandbox.kafka import Kafka, Node, new_id, server_properties, some_free_ports, until_started

WHOLE_WITHIN_S = 60.0


class LocalCluster(Kafka):
    """Brokers that are controllers too, numbered from 1, with their data in a temporary folder.

    Every partition has a replica on each of them (on three of them, where there are more), and a record counts as
    written once two have it: so one broker may be killed, stopped or suspended, and nothing is lost or refused.
    A context manager, as `LocalKafka`.
    """

    def __init__(self, brokers: int = 3) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tallyman-cluster-"))
        ports = some_free_ports(2 * brokers)
        numbers = range(1, brokers + 1)
        addresses = {number: f"127.0.0.1:{ports[number - 1]}" for number in numbers}
        controllers = {number: f"127.0.0.1:{ports[brokers + number - 1]}" for number in numbers}
        super().__init__(",".join(addresses.values()))
        replicas = {
            "controller.quorum.voters": ",".join(f"{number}@{at}" for number, at in controllers.items()),
            "default.replication.factor": str(min(3, brokers)),
            "offsets.topic.replication.factor": str(min(3, brokers)),
            "offsets.topic.num.partitions": str(brokers),
            "transaction.state.log.replication.factor": str(min(3, brokers)),
            "transaction.state.log.num.partitions": str(brokers),
            "min.insync.replicas": str(min(2, brokers)),
            "transaction.state.log.min.isr": str(min(2, brokers)),
            # Leaders move when a test wants it.
            "auto.leader.rebalance.enable": "false",
        }
        self.nodes = {
            number: Node(
                self._folder / f"broker-{number}",
                {
                    **server_properties(),
                    **replicas,
                    "node.id": str(number),
                    "listeners": f"PLAINTEXT://{addresses[number]},CONTROLLER://{controllers[number]}",
                    "advertised.listeners": f"PLAINTEXT://{addresses[number]}",
                },
                heap="320m",
            )
            for number in numbers
        }

    def __enter__(self) -> Self:
        try:
            first, *others = self.nodes
            self.nodes[first].format(new_id())
            for number in others:
                self.nodes[number].format_like(self.nodes[first], number)
            for node in self.nodes.values():
                node.start()
            until_started(lambda: self.present == set(self.nodes), self.nodes.values())
        except BaseException as error:
            self._kill_all()
            error.add_note(f"the brokers' logs are kept in {self._folder}")
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill_all()
        shutil.rmtree(self._folder)

    @property
    def present(self) -> set[int]:
        """The brokers that the cluster counts among its own at this moment; none where it does not answer."""
        try:
            return set(self._admin().list_topics(timeout=2.0).brokers)
        except KafkaException:
            return set()

    def whole(self) -> bool:
        """Whether every partition has a leader, and all of its replicas are up to date: as every broker sees it."""
        return all(self._whole_at(address) for address in self.bootstrap_servers.split(","))

    def _whole_at(self, address: str) -> bool:
        # A broker that was suspended answers with what it knew before.
        try:
            found = AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=2.0)
        except KafkaException:
            return False
        partitions = [each for topic in found.topics.values() for each in topic.partitions.values()]
        return set(found.brokers) == set(self.nodes) and all(
            each.leader != -1 and len(each.isrs) == len(each.replicas) for each in partitions
        )

    def until_whole(self) -> None:
        """Wait until that is so."""
        deadline = time.monotonic() + WHOLE_WITHIN_S
        while not self.whole():
            if time.monotonic() > deadline:
                logs = "\n".join(node.log_tail() for node in self.nodes.values())
                raise TimeoutError(f"the cluster is not whole within {WHOLE_WITHIN_S:.0f} s\n{logs}")
            time.sleep(0.1)

    def leaders(self) -> Counter[int]:
        """How many partitions each broker leads."""
        topics = self._admin().list_topics(timeout=10.0).topics.values()
        return Counter(each.leader for topic in topics for each in topic.partitions.values())

    def balance(self) -> int:
        """Make the first replica of each partition its leader; returns how many leaders that moves.

        Whenever a broker has been away, others lead what it led.
        """
        admin = self._admin()
        moves = [
            TopicPartition(name, each.id)
            for name, topic in admin.list_topics(timeout=10.0).topics.items()
            for each in topic.partitions.values()
            if each.replicas[0] != each.leader
        ]
        if moves:
            # Without a timeout of its own: the client's binding of this call takes none.
            admin.elect_leaders(ElectionType.PREFERRED, moves).result(30.0)
        return len(moves)

    def _kill_all(self) -> None:
        for node in self.nodes.values():
            node.kill()
