"""Chat templates: the model's Jinja text, rendered in a sandbox to what transformers' `apply_chat_template` gives."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]]

# Private-use characters that fence control tokens found inside messages; stripped from the input first.
FENCE_OPEN, FENCE_CLOSE = "\ue0f0", "\ue0f1"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Piece(NamedTuple):
    """A stretch of a rendered chat; `literal` ones came from a message and must not become control tokens."""

    text: str
    literal: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template with the special tokens it may name."""

    source: str
    digest: str
    special: dict[str, str]
    compiled: jinja2.Template

    @classmethod
    def load(cls, root: Path, options: dict[str, Any]) -> Self | None:
        """From chat_template.jinja or tokenizer_config.json; None when the model has no template."""
        source = _source(root, options)
        if source is None:
            return None
        special = {name: _content(options[name]) for name in SPECIAL_NAMES if options.get(name)}
        try:
            compiled = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {root.name} does not compile: {error}") from error
        return cls(source, hashlib.sha256(source.encode()).hexdigest(), special, compiled)

    @property
    def knows_tools(self) -> bool:
        """Whether the template has a place for tools."""
        return re.search(r"\btools\b", self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Tools | None = None,
        at: datetime | None = None,
    ) -> str:
        """The chat as text; a template that prints the day is told `at`, or today.

        Raises ValueError with the template's own complaint.
        """
        if not messages:
            raise ValueError("a chat needs at least one message")
        # Clients send explicit nulls, which many templates would print as "None".
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self.compiled.render(
                messages=plain, tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
                strftime_now=_clock(at), **self.special,
            )  # fmt: skip
        except Exception as error:
            # A template is a program that came with the model; it can raise anything.
            raise ValueError(f"the chat template refused these messages: {error}") from error

    def render_pieces(
        self,
        messages: Sequence[Message],
        control_tokens: Sequence[str],
        add_generation_prompt: bool,
        tools: Tools | None = None,
        at: datetime | None = None,
    ) -> list[Piece]:
        """The rendered chat, cut where a message or a tool spelled out a control token."""
        pattern = re.compile("|".join(map(re.escape, control_tokens)) or "(?!)")
        fenced = [_fence_message(message, pattern) for message in messages]
        fenced_tools = None if tools is None else [_fence_message(tool, pattern) for tool in tools]
        text = self.render(fenced, add_generation_prompt=add_generation_prompt, tools=fenced_tools, at=at)
        if FENCE_OPEN not in text and FENCE_CLOSE not in text:
            return [Piece(text, literal=False)]
        # A template may cut a fenced token apart; a lone fence then still keeps its neighbours from joining.
        cut = re.split(f"{FENCE_OPEN}({pattern.pattern}){FENCE_CLOSE}|[{FENCE_OPEN}{FENCE_CLOSE}]", text)
        return [Piece(part, literal=index % 2 == 1) for index, part in enumerate(cut) if part]


def _fence_message(message: Message, pattern: re.Pattern[str]) -> Message:
    return {key: _fence(value, pattern) for key, value in message.items()}


def _fence(value: object, pattern: re.Pattern[str]) -> object:
    if isinstance(value, str):
        return _fence_text(value, pattern)
    if isinstance(value, dict):
        # Keys of arguments and schemas are the client's words too.
        return {_fence_text(key, pattern): _fence(item, pattern) for key, item in value.items()}
    if isinstance(value, list):
        return [_fence(item, pattern) for item in value]
    return value


def _fence_text(text: str, pattern: re.Pattern[str]) -> str:
    bare = text.replace(FENCE_OPEN, "").replace(FENCE_CLOSE, "")
    return pattern.sub(lambda match: f"{FENCE_OPEN}{match[0]}{FENCE_CLOSE}", bare)


def _source(root: Path, options: dict[str, Any]) -> str | None:
    file = root / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    inline = options.get("chat_template")
    if isinstance(inline, list):
        named = {entry["name"]: entry["template"] for entry in inline}
        inline = named.get("default")
    return inline if isinstance(inline, str) else None


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training masks; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _clock(at: datetime | None) -> Callable[[str], str]:
    """What templates know as `strftime_now`, in this machine's time zone as transformers has it."""
    return lambda pattern: (at.astimezone() if at else datetime.now()).strftime(pattern)
