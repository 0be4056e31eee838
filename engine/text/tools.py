"""Tool calls in a model's text, found as the text comes, in the form its chat template teaches.

Two forms: "hermes", `<tool_call>{"name": …, "arguments": {…}}</tool_call>` anywhere in the text (Hermes, Qwen), and
"json", an answer that is nothing but such objects, with `parameters` or `arguments` (Llama 3, Mistral). What a model
writes is hostile text: arguments are passed on as they stand and never evaluated; what is no call to a known tool is
text.
"""

import json
import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, NoReturn

from engine.text.stops import overlap

Style = Literal["hermes", "json"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Written before the answer when a call is forced, so that the model goes on where its training would have it be.
FORCED_PREFIX: dict[Style, str] = {"hermes": f"{OPEN}\n", "json": ""}
HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
OUTSIDE, INSIDE = re.compile(r'["{}\[\]<]'), re.compile(r'["\\]')
SPACE = " \t\r\n"
BETWEEN = f"{SPACE};,]"
LEADS = ("<|python_tag|>", "[TOOL_CALLS]")


class CallDelta(NamedTuple):
    """A stretch of one call; `name` stands in its first. The `arguments` of all its deltas joined are its JSON text."""

    number: int
    name: str | None
    arguments: str


class Parsed(NamedTuple):
    """What became certain: text for the reader, and stretches of calls."""

    text: str
    calls: list[CallDelta]


def style_of(template: str) -> Style:
    """The form a chat template teaches; Hermes when it does not tell."""
    if OPEN in template:
        return "hermes"
    return "json" if '"parameters"' in template or LEADS[1] in template else "hermes"


def argument_key(template: str) -> str:
    """What the template calls a call's arguments."""
    return "parameters" if style_of(template) == "json" and '"parameters"' in template else "arguments"


class ToolCallParser:
    """Fed the answer in any pieces, tells calls from text; the same joined result however the pieces are cut.

    `names` are the request's tools. `begun` says that the prompt already opened a call. After `most` calls `done` is
    set and the rest is swallowed.
    """

    def __init__(self, style: Style, names: Collection[str], *, begun: bool = False, most: int | None = None) -> None:
        self._hermes = style == "hermes"
        self._names = frozenset(names)
        self._most = most
        self._buffer = ""
        self._lead = ""
        self._count = 0
        self._trim = False
        self._call = _Object()
        self._step = self._in_call if begun else self._before_tag if self._hermes else self._before_object
        self._text: list[str] = []
        self._deltas: list[CallDelta] = []
        self.done = False

    def push(self, text: str) -> Parsed:
        """Add text."""
        self._buffer += text
        while not self.done and self._step():
            pass
        return self._take()

    def flush(self) -> Parsed:
        """The rest: what was held back, and a call that broke off before its name was certain, are text."""
        if not self.done:
            self._show(self._lead + self._unfinished())
            self._buffer = self._lead = ""
            self._step = self._after_all
        return self._take()

    def _unfinished(self) -> str:
        if self._step == self._in_call:
            return "" if self._call.announced else self._call.text
        if self._step == self._after_call or (self._count and not self._buffer.strip()):
            return ""
        return self._buffer

    def _take(self) -> Parsed:
        parsed = Parsed("".join(self._text), self._deltas)
        self._text, self._deltas = [], []
        return parsed

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)

    def _before_tag(self) -> bool:
        """Space around calls is part of the form, so it waits until something follows it."""
        if self._trim:
            self._buffer = self._buffer.lstrip()
            self._trim = not self._buffer
        place = self._buffer.find(OPEN)
        if place < 0:
            certain = self._buffer[: len(self._buffer) - overlap(self._buffer, OPEN)].rstrip()
            self._show(certain)
            self._buffer = self._buffer[len(certain) :]
            return False
        before = self._buffer[:place].rstrip()
        lead = self._buffer[len(before) : place + len(OPEN)]
        self._show(before)
        self._buffer = self._buffer[place + len(OPEN) :]
        self._begin(lead)
        return True

    def _before_object(self) -> bool:
        """Whether the whole answer is calls shows at its first characters."""
        bare = self._buffer.lstrip()
        if any(lead.startswith(bare) for lead in LEADS):
            return False
        for lead in LEADS:
            bare = bare.removeprefix(lead).lstrip()
        bare = bare.removeprefix("[").lstrip()
        if not bare:
            return False
        if bare[0] != "{":
            self._step = self._after_all
            return True
        lead, self._buffer = self._buffer[: len(self._buffer) - len(bare)], bare
        self._begin(lead)
        return True

    def _begin(self, lead: str) -> None:
        self._lead = lead
        self._call = _Object()
        self._step = self._in_call

    def _in_call(self) -> bool:
        call, more, self._buffer = self._call, self._buffer, ""
        call.push(more)
        if not call.announced and call.name in self._names:
            self._emit(call.name, "")
            call.announced = True
            self._lead = ""
        if call.announced and (arguments := call.take_arguments()):
            self._emit(None, arguments)
        if call.end is None:
            return False
        self._end_call(call, call.end)
        return True

    def _end_call(self, call: "_Object", end: int) -> None:
        self._buffer = call.text[end:]
        if not call.announced:
            whole = None if call.broken else _read(call.text[:end], self._names)
            if whole is None:
                self._show(self._lead + call.text[:end])
                self._lead = ""
                self._step = self._before_tag if self._hermes else self._after_all
                return
            self._emit(*whole)
        self._lead = ""
        self._count += 1
        self.done = self._count == self._most
        self._step = self._after_call

    def _emit(self, name: str | None, arguments: str) -> None:
        self._deltas.append(CallDelta(self._count, name, arguments))

    def _after_call(self) -> bool:
        self._buffer = bare = self._buffer.lstrip(SPACE if self._hermes else BETWEEN)
        if not bare or (self._hermes and bare != CLOSE and CLOSE.startswith(bare)):
            return False
        if self._hermes:
            self._buffer = bare.removeprefix(CLOSE)
            self._trim = True
            self._step = self._before_tag
        elif bare[0] == "{":
            self._begin("")
        else:
            self._step = self._after_all
        return True

    def _after_all(self) -> bool:
        self._show(self._buffer)
        self._buffer = ""
        return False


class _Object:
    """One JSON object read as it comes, by its outline only: where its strings and brackets begin and end.

    `broken` says that it ended, at `end`, where no JSON goes on. Sent arguments cannot be unsent, so a broken call that
    was announced stays one, with the arguments it got.
    """

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.announced = False
        self.broken = False
        self.end: int | None = None
        self._arguments_end: int | None = None
        self._taken = -1
        self._position = 0
        self._depth = 0
        self._quoted = False

    def push(self, more: str) -> None:
        """Add text and look as far as it goes."""
        self.text += more
        if self.name is None and (header := HEADER.match(self.text)):
            self.name, self._taken = header[1], header.end()
        if self._depth == 0 and (bare := self.text.lstrip()) and bare[0] != "{":
            self.broken, self.end = True, 0
        while self.end is None and (match := (INSIDE if self._quoted else OUTSIDE).search(self.text, self._position)):
            self._position = match.end()
            self._note(match[0])
        if self.end is None:
            self._position = max(self._position, len(self.text))

    def take_arguments(self) -> str:
        """What is known of the arguments since the last time."""
        ends = (self._arguments_end, self.end, len(self.text))
        start, self._taken = self._taken, next(end for end in ends if end is not None)
        return self.text[start : self._taken]

    def _note(self, mark: str) -> None:
        if mark == "\\":
            self._position += 1
        elif mark == '"':
            self._quoted = not self._quoted
        elif mark in "{[":
            self._depth += 1
        elif mark == "<":
            self.broken, self.end = True, self._position - 1
        else:
            self._depth -= 1
            if self._depth == 1 and self._taken >= 0 and self._arguments_end is None:
                self._arguments_end = self._position
            if self._depth <= 0:
                self.end = self._position


def _read(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """Name and arguments of a call written in another order than the usual one; None when it is no call."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    inner = value.get("function")
    call: dict[str, Any] = inner if isinstance(inner, dict) else value
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict | str):
        return None
    written = _written(arguments)
    return None if written is None else (name, written)


def _written(arguments: dict[str, Any] | str) -> str | None:
    """The text of arguments; None when no JSON and no UTF-8 can hold them (infinite numbers, halves of characters)."""
    try:
        if isinstance(arguments, dict):
            # Escapes may spell halves of characters, which only escapes can write again.
            return json.dumps(arguments, ensure_ascii=True, allow_nan=False)
        arguments.encode()
    except (ValueError, RecursionError):
        return None
    return arguments


def _refuse_constant(name: str) -> NoReturn:
    """Python reads NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is no JSON")
