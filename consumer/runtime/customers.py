"""Who a customer is at Stripe: as the events say, or as a file says that is read again whenever it changes."""

from collections.abc import Mapping
from pathlib import Path

import structlog
import yaml

from consumer.deliver.customers import Customers, UnmappedError

log = structlog.get_logger()


class CustomerFileError(Exception):
    """The file cannot be used; the message names the place and the cure."""


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
    def billed(self) -> int:
        """How many Stripe customers there are in it."""
        return len({each for each in self._customers.values() if each is not None})

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
        self.customers = self._read()

    def changed(self) -> Customers | None:
        """The customers, if the file has changed since they were read; a file that is of no use changes nothing."""
        try:
            if self._stamp() == self._seen:
                return None
            customers = self._read()
        except (CustomerFileError, OSError) as wrong:
            log.error(  # noqa: TRY400 - the reason says it all
                "customer_file_refused", path=str(self.path), reason=str(wrong), kept=len(self.customers)
            )
            return None
        self.customers = customers
        log.info("customer_file_read", path=str(self.path), customers=len(customers))
        return customers

    def _stamp(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> Mapped:
        try:
            self._seen = self._stamp()
            found = yaml.load(self.path.read_bytes(), yaml.CSafeLoader)
        except OSError as failed:
            raise CustomerFileError(f"customers.path: {self.path} cannot be read: {failed.strerror}") from None
        except yaml.YAMLError as wrong:
            raise CustomerFileError(f"customers.path: {self.path} is no YAML: {wrong}") from None
        if not isinstance(found, dict) or not found:
            raise CustomerFileError(f"customers.path: {self.path} holds no customers; write lines like acme: cus_123")
        for name, customer in found.items():
            if not isinstance(name, str) or not (customer is None or (isinstance(customer, str) and customer)):
                raise CustomerFileError(
                    f"customers.path: {self.path}: {name!r}: {customer!r} is no name with a Stripe customer or null "
                    "(names of digits need quotes)"
                )
        return Mapped(found)
