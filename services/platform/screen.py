"""What `whet up` shows: a calm list while parts start, then where everything is, then only what needs attention."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


@dataclass
class Step:
    """One line of the list. `seconds` is None until it is done."""

    name: str
    note: str
    begun: float
    seconds: float | None = None
    spinner: Spinner = field(default_factory=lambda: Spinner("dots", style="cyan"))


class Screen:
    """Lives on a terminal; elsewhere it prints one plain line per finished step."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._steps: dict[str, Step] = {}
        self._begun = time.monotonic()

    @contextmanager
    def starting(self, title: str) -> Iterator[None]:
        """While parts start."""
        self.console.print(Text.assemble(("\n  Whet", "bold"), f"  {title}\n", style="default"))
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self._list, console=self.console, refresh_per_second=12, transient=False):
            yield

    def begin(self, name: str, note: str = "") -> None:
        """A step starts."""
        self._steps[name] = Step(name, note, time.monotonic())

    def done(self, name: str) -> None:
        """A step is done."""
        step = self._steps[name]
        step.seconds = time.monotonic() - step.begun
        if not self.console.is_terminal:
            self.console.print(f"  {step.name} ready in {step.seconds:.1f} s", soft_wrap=True)

    def note(self, sentence: str) -> None:
        """Something happened while running."""
        self.console.print(f"  [dim]{time.strftime('%H:%M:%S')}[/dim]  {sentence}", soft_wrap=True)

    def ready(self, facts: dict[str, object], logs: Path) -> None:
        """Everything runs: where to go now. Links and keys are never wrapped, so that they can be copied."""
        slugs = _strings(facts["projects"])
        rows = {
            "Sign in": f"[link={facts['sign_in_url']}]{facts['sign_in_url']}[/link]  [dim](works once)[/dim]",
            "Console": str(facts["console_url"]),
            "API": f"{facts['gateway_url']}/v1",
            "API key": f"[bold]{facts['app_key']}[/bold]",
            "Models": " · ".join(slugs),
            "Logs": str(logs),
        }
        seconds = time.monotonic() - self._begun
        self.console.print(f"\n  [green]Ready[/green] in {seconds:.1f} s. Ctrl-C stops everything.\n")
        for name, value in rows.items():
            self.console.print(f"  [cyan]{name:<9}[/cyan]{value}", soft_wrap=True)
        self.console.print("\n  [dim]Try it:[/dim]\n")
        self.console.print(_curl(facts, slugs), soft_wrap=True, markup=False)
        self.console.print()

    def _list(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for step in self._steps.values():
            done = step.seconds is not None
            sign: RenderableType = Text("✓", style="green") if done else step.spinner
            seconds = step.seconds if step.seconds is not None else time.monotonic() - step.begun
            table.add_row(sign, step.name, Text(f"{seconds:.1f} s", style="dim"), Text(step.note, style="dim"))
        return Group(Padding(table, (0, 0, 0, 2)))


def _curl(facts: dict[str, object], slugs: Sequence[str]) -> str:
    model = "entities" if "entities" in slugs else slugs[0]
    said = "Ada Lindberg joined Amber Labs in Oakford on 9 March 2021." if model == "entities" else "Hello!"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": said}]})
    return (
        f"  curl {facts['gateway_url']}/v1/chat/completions \\\n"
        f"    -H 'Authorization: Bearer {facts['app_key']}' \\\n"
        f"    -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'"
    )


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
