"""Processes that end with whoever has started them."""

from __future__ import annotations

import subprocess


def guard(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Ends this process when we end, however we end: then the pipe to the guard closes.

    To be killed before the process is waited for: it could end somebody else who has been given the same number.
    """
    return subprocess.Popen(  # noqa: S603 - our own command line
        ["/bin/sh", "-c", 'read -r _; kill -9 "$0"', str(process.pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not our end yet
    )
