"""Logs, configured in one place: for people on a terminal, as JSON lines everywhere else, and never with a secret."""

import logging
import sys
from typing import Final

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from consumer import credentials

LEVELS: Final = ("debug", "info", "warning", "error")


def configure(level: str) -> None:
    """Log from this level on, to stderr; what libraries log comes through as well."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    render: list[Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if sys.stderr.isatty()
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
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
