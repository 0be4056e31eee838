"""What an example can teach, in the three forms that TRL's trainers take.

One example has one row here and up to three forms: a correction is an answer to imitate, a pair (the correction over
the original) and a good and a bad answer. Nothing is stored twice.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

Form = Literal["prompt-completion", "preference", "unpaired"]
FORMS: tuple[Form, ...] = get_args(Form)
Message = dict[str, Any]


class Teaching(Protocol):
    """The part of an example that the forms are made of."""

    @property
    def kind(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def messages(self) -> list[Any]: ...
    @property
    def completion(self) -> str | None: ...
    @property
    def rejected(self) -> str | None: ...


def is_supervised(example: Teaching) -> bool:
    """Whether the completion is right as it stands. The better of two answers is only better."""
    return example.completion is not None and not _only_better(example)


def _only_better(example: Teaching) -> bool:
    return example.source == "preferred" or (example.source == "imported" and example.kind == "preference")


def rows_of(example: Teaching, form: Form) -> list[dict[str, Any]]:
    """The example's rows in a form, conversational as TRL calls it; empty when it has nothing to say in that form."""
    prompt = [plain_message(message) for message in example.messages]
    good, bad = example.completion, example.rejected
    if form == "preference":
        pair = good is not None and bad is not None
        return [{"prompt": prompt, "chosen": _said(good or ""), "rejected": _said(bad or "")}] if pair else []
    if _only_better(example):
        return []
    if form == "prompt-completion":
        return [{"prompt": prompt, "completion": _said(good)}] if good is not None else []
    judged = [(text, label) for text, label in ((good, True), (bad, False)) if text is not None]
    return [{"prompt": prompt, "completion": _said(text), "label": label} for text, label in judged]


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def plain_message(message: Mapping[str, Any]) -> Message:
    """A message whose content is text: columns of a Parquet file have one type."""
    kept = {key: value for key, value in message.items() if value is not None and key != "content"}
    return {"role": str(kept.pop("role", "user")), "content": text_of(message.get("content")), **kept}


def text_of(content: object) -> str:
    """A message's content as text: parts joined, what is no text as JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "\n".join(str(part["text"]) for part in content)
    return json.dumps(content, ensure_ascii=False)
