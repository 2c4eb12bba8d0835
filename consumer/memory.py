"""Remembering what a function made of the texts that keep coming back."""

from collections.abc import Callable
from typing import TypeVar

_Piece = TypeVar("_Piece", bound=str | bytes)
_Value = TypeVar("_Value")


class Memory(dict[_Piece, _Value]):
    """Bounded, since anybody can send new ones."""

    def __init__(self, of: Callable[[_Piece], _Value]) -> None:
        super().__init__()
        self._of = of

    def __missing__(self, piece: _Piece) -> _Value:
        value = self._of(piece)
        if len(piece) <= 100:
            if len(self) >= 16_384:
                self.clear()
            self[piece] = value
        return value
