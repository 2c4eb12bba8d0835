"""What the Kafka store writes, seen without a Kafka."""

from __future__ import annotations

import struct

import pytest

from consumer.storage.kafka_records import is_member, partition_of


@pytest.mark.parametrize(
    ("key", "partitions", "partition"),
    [
        (b"", 1, 0),
        (b"", 3, 0),
        (b"cus_a", 3, 1),
        (b"cus_b", 3, 1),
        (b"cus_NffrFeUfNV2Hib", 12, 8),
        (b"cus_NffrFeUfNV2Hib", 64, 60),
        ("Müller".encode(), 7, 1),
        (b"\x00\xff", 1000, 981),
    ],
)
def test_a_customers_totals_lie_for_ever_where_they_lie_now(key: bytes, partitions: int, partition: int) -> None:
    assert partition_of(key, partitions) == partition


def test_customers_are_spread_over_all_partitions() -> None:
    counts = [0] * 12
    for number in range(12_000):
        counts[partition_of(b"cus_%06d" % number, 12)] += 1
    assert min(counts) > 800
    assert max(counts) < 1_200


def metadata(generation: int, member: bytes, *, magic: bytes = b"CGMDv2:") -> bytes:
    return magic + struct.pack("=i", generation) + b"group\x00" + member + b"\x00\x01"


def test_only_who_has_a_generation_and_a_name_is_a_member() -> None:
    assert is_member(metadata(1, b"rdkafka-1"))
    assert is_member(metadata(0, b"rdkafka-1"))
    assert not is_member(metadata(-1, b"rdkafka-1"))
    assert not is_member(metadata(1, b""))
    assert not is_member(metadata(-1, b""))


@pytest.mark.parametrize("unknown", [b"", b"CGMDv2:", metadata(1, b"rdkafka-1", magic=b"CGMDv3:")])
def test_what_cannot_be_read_is_no_membership(unknown: bytes) -> None:
    assert not is_member(unknown)
