"""``python -m consumer`` is the command ``tallyman``."""

from consumer.cli import main

main()
