"""The scenarios of the CloudEvents conformance suite for the Kafka protocol binding."""

import json

import pytest

from consumer.events import Decoder, Event, Headers

ATTRIBUTES = {
    "id": "1234-1234-1234",
    "specversion": "1.0",
    "type": "com.example.someevent",
    "source": "/mycontext/subcontext",
    "time": "2018-04-05T03:56:24Z",
    "datacontenttype": "application/json",
}
DATA = {"message": "Hello World!"}
DECODER = Decoder([(), ("message",)], ATTRIBUTES)


def then_attributes_and_data_are_those_of_the_scenario(event: Event) -> None:
    data = DECODER.raw(())(event)

    assert {name: DECODER.attribute(name)(event) for name in ATTRIBUTES} == ATTRIBUTES
    assert json.loads(bytes(data or b"")) == DATA


def test_binary_content_mode() -> None:
    headers: Headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", b"1234-1234-1234"),
        ("ce_type", b"com.example.someevent"),
        ("ce_source", b"/mycontext/subcontext"),
        ("ce_time", b"2018-04-05T03:56:24Z"),
        ("content-type", b"application/json"),
    ]

    event = DECODER.decode(headers, b'{"message": "Hello World!"}')

    then_attributes_and_data_are_those_of_the_scenario(event)


@pytest.mark.parametrize(
    "content_type", [b"application/cloudevents+json", b"application/cloudevents+json; charset=utf-8"]
)
def test_structured_content_mode(content_type: bytes) -> None:
    value = b"""
        {
            "specversion": "1.0",
            "type": "com.example.someevent",
            "time": "2018-04-05T03:56:24Z",
            "id": "1234-1234-1234",
            "source": "/mycontext/subcontext",
            "datacontenttype": "application/json",
            "data": {
                "message": "Hello World!"
            }
        }
        """

    event = DECODER.decode([("content-type", content_type)], value)

    then_attributes_and_data_are_those_of_the_scenario(event)
