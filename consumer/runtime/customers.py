"""Who a customer is at Stripe: as the events say, or as a file says that is read again whenever it changes."""

from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import structlog
import yaml

from consumer.deliver.customers import Customers, UnmappedError

log = structlog.get_logger()


class CustomerFileError(Exception):
    """The file cannot be used; the message names the place and the cure, but no customer: it is logged."""


class Passthrough:
    """The events name Stripe customers themselves."""

    def stripe_customer(self, name: str) -> str | None:
        """The name."""
        return name


class Mapped:
    """A mapping from names to Stripe customers, or to null for those who are not billed."""

    def __init__(self, customers: Mapping[str, str | None]) -> None:
        self._customers = customers

    def __len__(self) -> int:
        return len(self._customers)

    @property
    def at_stripe(self) -> set[str]:
        """The Stripe customers in it."""
        return {each for each in self._customers.values() if each is not None}

    @property
    def billed(self) -> int:
        """How many Stripe customers there are in it."""
        return len(self.at_stripe)

    def stripe_customer(self, name: str) -> str | None:
        """The Stripe customer, or None; raises ``UnmappedError``."""
        try:
            return self._customers[name]
        except KeyError:
            raise UnmappedError(name) from None


class CustomerFile:
    """A YAML or JSON file of one mapping, ``name: cus_…`` or ``name: null``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._last: tuple[int, int, int] | None = None
        self.refused = False
        """Whether the file, as it is now, is of no use, and what it held before is used."""
        self.customers = self._read()

    def changed(self) -> Customers | None:
        """The customers, if the file has changed since they were read; a file that is of no use changes nothing.

        To be called again and again: a file is read when it is the same twice, lest it is still being written.
        """
        try:
            last, self._last = self._last, self._stamp()
            if self._last == self._seen or self._last != last:
                return None
            customers = self._read()
        except (CustomerFileError, OSError) as wrong:
            if not self.refused:
                log.error(  # noqa: TRY400 - the reason says it all
                    "customer_file_refused", path=str(self.path), reason=str(wrong), kept=len(self.customers)
                )
            self.refused = True
            return None
        self.customers, self.refused = customers, False
        log.info("customer_file_read", path=str(self.path), customers=len(customers))
        return customers

    def _stamp(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> Mapped:
        try:
            self._seen = self._stamp()
            text = self.path.read_bytes()
            found = yaml.load(text, _Loader)  # noqa: S506 - it is the safe one
        except OSError as failed:
            raise CustomerFileError(f"customers.path: {self.path} cannot be read: {failed.strerror}") from None
        except _Twice as wrong:
            raise CustomerFileError(
                f"customers.path: {self.path}, lines {wrong.first} and {wrong.second}: a name is in it twice"
            ) from None
        except yaml.MarkedYAMLError as wrong:
            at = wrong.problem_mark
            place = f", line {at.line + 1}, column {at.column + 1}" if at is not None else ""
            raise CustomerFileError(f"customers.path: {self.path} is no YAML{place}") from None
        except (TypeError, ValueError):  # a list as a name, a 13th month
            raise CustomerFileError(
                f"customers.path: {self.path} holds something else than text: write lines like acme: cus_123, and in "
                "quotes what looks like a date, a number or a list"
            ) from None
        except yaml.YAMLError:
            raise CustomerFileError(f"customers.path: {self.path} is no YAML: it has bytes that are no text") from None
        if found is not None and not isinstance(found, dict):
            raise CustomerFileError(f"customers.path: {self.path} is no mapping; write lines like acme: cus_123")
        if not found:
            raise CustomerFileError(f"customers.path: {self.path} holds no customers; write lines like acme: cus_123")
        for number, (name, customer) in enumerate(found.items()):
            if not isinstance(name, str) or not (customer is None or (isinstance(customer, str) and customer)):
                raise CustomerFileError(
                    f"customers.path: {self.path}, {_place(text, number)} is no name with a Stripe customer or null "
                    "(names of digits need quotes)"
                )
        if not text.endswith((b"\n", b"}")):
            raise CustomerFileError(f"customers.path: {self.path} ends in the middle of a line: is it all there?")
        return Mapped(found)


def _place(text: bytes, number: int) -> str:
    """Where an entry of a mapping stands, told without its name."""
    node = yaml.compose(text, _Loader)
    if isinstance(node, yaml.MappingNode) and number < len(node.value):
        return f"line {node.value[number][0].start_mark.line + 1}"
    return f"entry {number + 1}"


class _Twice(Exception):
    """A name stands on two lines."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(first, second)
        self.first, self.second = first, second


class _Loader(yaml.CSafeLoader):
    """Of one name with two customers nobody knows which is meant."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            first, second, *_ = (key.start_mark.line + 1 for key, _ in node.value if key.value == twice)
            raise _Twice(first, second)
        return super().construct_mapping(node, deep)
