"""What `check` says of one thing."""

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. Where it is not right, ``says`` ends with what to do."""

    level: Level
    what: str
    says: str
