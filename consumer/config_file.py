"""The text of the configuration: YAML as data, with the place of everything in it.

Plain scalars are read as YAML 1.2 reads them (`NO` is a text, `1:30` is one too), except that numbers with a point are
exact and an integer is written without leading zeros; everything else is text. That is what filters need.
"""

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, Final, NamedTuple

import yaml

Place = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""


class Problem(NamedTuple):
    """What is wrong, and where."""

    line: int
    """From 1; 0 where it is not in the file."""
    where: str
    message: str


class Document:
    """A YAML file as data (`data`), with the line of each place and what is wrong with it as YAML (`problems`)."""

    def __init__(self, text: str) -> None:
        self.data: Any = None
        self.problems: list[Problem] = []
        self._lines: dict[Place, int] = {(): 1}
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            # What PyYAML quotes may be a password that was not put in quotes.
            said = re.sub(r"(['\"])(?!<)[^'\"]{2,}\1", "…", error.problem or "cannot be read")
            self.problems.append(Problem(mark.line + 1 if mark else 1, "", f"not YAML: {said}"))
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.problems.append(Problem(line, "", f"not YAML: {error.reason}"))
        else:
            self.data = {} if root is None else self._plain(root, (), ())

    def line(self, place: Place) -> int:
        """The line of a place, or of the nearest one around it."""
        while place not in self._lines:
            place = place[:-1]
        return self._lines[place]

    def at(self, line: int) -> Place:
        """The first place of a line."""
        return next((place for place, number in self._lines.items() if number == line and place), ())

    def problem(self, place: Place, message: str) -> None:
        """Note what is wrong at a place."""
        self.problems.append(Problem(self.line(place), written(place), message))

    def narrowed(self, location: Place) -> Place:
        """The place that a validator means: without what names its own branches rather than keys of the file."""
        place: list[str | int] = []
        *around, last = location or ("[key]",)
        for part in around:
            if (*place, part) in self._lines:
                place.append(part)
        return tuple(place) if last == "[key]" else (*place, last)

    def _plain(self, node: yaml.Node, place: Place, around: tuple[yaml.Node, ...]) -> Any:
        if node in around:
            self.problem(place, "contains itself")
            return None
        around = (*around, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _STANDARD + "map":
            return self._mapping(node, place, around)
        if isinstance(node, yaml.SequenceNode) and node.tag == _STANDARD + "seq":
            values = []
            for position, each in enumerate(node.value):
                self._lines[*place, position] = each.start_mark.line + 1
                values.append(self._plain(each, (*place, position), around))
            return values
        meaning = _SCALARS.get(node.tag) if isinstance(node, yaml.ScalarNode) else None
        if meaning is None or not meaning.pattern.fullmatch(node.value):
            self.problem(place, "tags (words that begin with !) have no meaning here: put a text in quotes")
            return None
        return meaning.read(node.value)

    def _mapping(self, node: yaml.MappingNode, place: Place, around: tuple[yaml.Node, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._plain(key_node, place, around)
            if not isinstance(key, str) or key == "<<":
                text = "merge keys (<<) are not supported" if key == "<<" else "a key must be text: put it in quotes"
                self.problems.append(Problem(line, written(place), text))
            elif key in values:
                first = self._lines[*place, key]
                self.problems.append(Problem(line, written((*place, key)), f"is here twice: first in line {first}"))
            else:
                self._lines[*place, key] = line
                values[key] = self._plain(value_node, (*place, key), around)
        return values


def written(place: Place) -> str:
    """A place as people write it: `meters[0].where["$.model"]`."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][\w-]*", part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def report(file: str, problems: Iterable[Problem]) -> str:
    """All that is wrong, in the order of the file."""
    listed = sorted(problems, key=lambda problem: (problem.line == 0, problem.line))
    lines = [f"{file}: {len(listed)} error{'s' if len(listed) > 1 else ''}"]
    for line, where, message in listed:
        place = ", ".join(part for part in (f"line {line}" if line else "environment", where) if part)
        lines += ["", f"  {place}", f"    {message}"]
    return "\n".join(lines)


class _Meaning(NamedTuple):
    pattern: re.Pattern[str]
    first: list[str]
    read: Callable[[str], Any]


_STANDARD: Final = "tag:yaml.org,2002:"

_SCALARS: Final = {
    _STANDARD + "null": _Meaning(re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""], lambda _: None),
    _STANDARD + "bool": _Meaning(
        re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"), lambda text: text.lower() == "true"
    ),
    _STANDARD + "int": _Meaning(re.compile("-?(0|[1-9][0-9]{0,99})"), list("-0123456789"), int),
    _STANDARD + "float": _Meaning(
        re.compile(r"-?(0|[1-9][0-9]{0,99})(\.[0-9]{1,99})?([eE][-+]?[0-9]{1,3})?"), list("-0123456789"), Decimal
    ),
    _STANDARD + "str": _Meaning(re.compile("(?s:.*)"), [], str),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - how PyYAML declares it


for _tag, _meaning in _SCALARS.items():
    if _meaning.first:
        _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_meaning.pattern.pattern})$"), _meaning.first)
