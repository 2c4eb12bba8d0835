"""Asking Kafka: which of its client's errors are waited for."""

import pytest
from confluent_kafka import KafkaError, KafkaException

from consumer.storage import StorageError
from consumer.storage.kafka_client import asked


class Broker:
    """Fails once, and then knows the answer."""

    def __init__(self, failure: int) -> None:
        self._failures = [failure]

    def __call__(self, _within: float) -> str:
        if self._failures:
            raise KafkaException(KafkaError(self._failures.pop()))
        return "it"


@pytest.mark.parametrize(
    "failure",
    [
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError._RESOLVE,
        KafkaError._SSL,
        KafkaError._AUTHENTICATION,
        KafkaError._DESTROY_BROKER,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError._NOENT,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.KAFKA_STORAGE_ERROR,
    ],
)
def test_an_outage_is_waited_for_however_the_client_says_it(failure: int) -> None:
    """Two that were taken for refusals ended processes: a broker had left the cluster, one had just begun to lead."""
    assert asked(Broker(failure), "what is asked for", within=5.0) == "it"


def test_what_does_not_pass_is_told_at_once() -> None:
    with pytest.raises(StorageError, match="what is asked for: Kafka says TOPIC_AUTHORIZATION_FAILED"):
        asked(Broker(KafkaError.TOPIC_AUTHORIZATION_FAILED), "what is asked for", within=5.0)
