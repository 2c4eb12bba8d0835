"""Logs, configured in one place: for people on a terminal, as JSON lines everywhere else.

Every line has the name of an event. None has a secret, and above debug none says who a customer is, what one used, or
what an event held: identifiers of totals are digests, and meters are the operator's own names.
"""

import logging
import sys
import threading
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any, Final

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from consumer import credentials

AGAIN_S: Final = 60.0
REMEMBERED: Final = 200
"""Lines of Kafka's client."""


def configure(level: str) -> None:
    """Log from this level on, to stderr; what libraries log comes through as well."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    # In either form without local variables, in which customers and secrets are.
    render: list[Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if for_people()
        else [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *render,
            _without_secrets,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries warn here of what is wrong; what they are doing otherwise is their own business.
    root = logging.getLogger()
    root.handlers = [*(each for each in root.handlers if not isinstance(each, _ToStructlog)), _ToStructlog()]
    root.setLevel(max(threshold, logging.WARNING))


def for_people() -> bool:
    """Whether stderr is a terminal; else it is read by machines, line by line."""
    return sys.stderr.isatty()


def log_uncaught() -> None:
    """From here on what nobody catches is logged too, in whatever thread, and what Python itself warns of."""

    def crashed(kind: type[BaseException], failure: BaseException | None, trace: TracebackType | None) -> None:
        if failure is not None and issubclass(kind, Exception):
            thread = threading.current_thread().name
            structlog.get_logger().critical("crashed", thread=thread, exc_info=(kind, failure, trace))
        elif not issubclass(kind, SystemExit):
            sys.__excepthook__(kind, failure or kind(), trace)

    sys.excepthook = crashed
    threading.excepthook = lambda args: crashed(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: crashed(args.exc_type, args.exc_value, args.exc_traceback)
    logging.captureWarnings(capture=True)


class _KafkaLines:
    """Takes the lines of Kafka's client; that calls it as it would one of Python's loggers.

    A client that cannot connect says so twenty times a second: what is the same is logged once a minute.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[str, str, str], tuple[float, int]] = {}
        """When a line was logged, and how often it has come since."""

    def log(self, level: int, _template: str, *parts: Any) -> None:
        """One line. What is raised here would cost the client the batch that it is about to hand over."""
        with suppress(Exception):
            facility, client, message = parts
            line, now = (facility, client, message.partition(" (after ")[0]), monotonic()
            at, times = self._said.get(line, (-AGAIN_S, 0))
            if now - at < AGAIN_S:
                self._said[line] = at, times + 1
                return
            if len(self._said) >= REMEMBERED:
                self._said.clear()
            self._said[line] = now, 0
            said = {"facility": facility, "client": client, "message": message} | ({"repeated": times} if times else {})
            structlog.get_logger().log(level, "kafka_client", **said)


KAFKA_LINES: Final = _KafkaLines()
"""For the setting ``logger`` of a client that is polled; what the others have to say comes as errors."""


def _without_secrets(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
    return credentials.hidden(str(line))  # the renderer before it has made text of the event


class _ToStructlog(logging.Handler):
    """Hands on what a library logs in Python's own way."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno,
            "library",
            logger=record.name,
            message=record.getMessage(),
            **({"exc_info": record.exc_info} if record.exc_info else {}),
        )
