"""Commands on golden data beside `build` and `show`: what changed, is it still the same, rows out and in."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.cli_client import AdminClient
from services.cli_learning import Name, Project, dataset_app, print_row, print_table, print_text, short
from services.errors import InvalidRequest
from services.settings import Settings
from services.store.forms import FORMS

Digest = Annotated[str, typer.Argument(help="The revision's digest, or 8 characters of it or more.")]
SHOWN = 20


def add_commands() -> None:
    """Put the commands on `whet dataset`."""
    for name, function in (("diff", diff), ("rebuild", rebuild), ("export", export), ("import", import_)):
        dataset_app.command(name)(function)


def diff(old: Digest, new: Digest) -> None:
    """What changed from one revision to another, and why."""
    found = AdminClient(Settings()).get(f"/api/revisions/{old}/diff/{new}")
    print_text(f"{short(found['old']['digest'])} → {short(found['new']['digest'])}: {found['kept']:,} rows kept")
    table = print_table("what", "rows", "why")
    for kind, causes in found["causes"].items():
        for why, count in causes.items():
            print_row(table, kind, f"{count:,}", why)
    print_text(table if table.row_count else "Nothing else changed.")
    rows = print_table("what", "example", "why", "answer")
    for change in found["changes"][:SHOWN]:
        one = change["after"] or change["before"]
        print_row(rows, change["kind"], short(one["content_hash"]), change["why"], (one["completion"] or "")[:100])
    if rows.row_count:
        print_text(rows)


def rebuild(digest: Digest) -> None:
    """Make the revision again from its manifest and compare digests. Exit code 1 unless they are the same."""
    found = AdminClient(Settings()).post(f"/api/revisions/{digest}/rebuild")
    print_text(
        f"{found['project']}/{found['dataset']}: {found['examples']:,} examples hashed again\n"
        f"revision {found['digest']}\nrebuilt  {found['rebuilt_digest']}\nheld out {found['rebuilt_held_out_digest']}"
    )
    if not found["same"]:
        changed = ", ".join(found["changed"][:5]) or "the membership"
        raise InvalidRequest(f"the revision is not what was built: {changed} changed")
    print_text("The same: nothing in it has changed since it was built.")


def export(
    digest: Digest,
    to: Annotated[Path, typer.Option(help="A directory that is empty or not there yet.")],
    kind: Annotated[str, typer.Option(help=f"{', '.join(FORMS)}.")] = "prompt-completion",
    push_to_hub: Annotated[
        str | None, typer.Option(help="Push it to this dataset repository, too: OWNER/NAME.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may read the repository.")] = False,
) -> None:
    """Write JSONL and Parquet that `datasets` and TRL read: one file a split, and a manifest."""
    token = _hub_token(push_to_hub) if push_to_hub or public else ""
    if kind not in FORMS:
        raise InvalidRequest(f"no kind {kind!r}: {', '.join(FORMS)}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InvalidRequest(f"{to} is not empty")
    client = AdminClient(Settings())
    found = client.get(f"/api/revisions/{digest}")
    to.mkdir(parents=True, exist_ok=True)
    counts = {split: _write(client, found["digest"], kind, split, to) for split in ("train", "held_out")}
    manifest = {name: value for name, value in found.items() if name not in ("counts", "report")}
    (to / "manifest.json").write_text(json.dumps({**manifest, "kind": kind, "rows": counts}, indent=2) + "\n")
    print_text(f"{to}: " + ", ".join(f"{count:,} {split} rows" for split, count in counts.items()))
    if push_to_hub:
        _push(to, push_to_hub, token, found["digest"], private=not public)


def _write(client: AdminClient, digest: str, kind: str, split: str, to: Path) -> int:
    """JSONL as it comes, then Parquet from it; a split without rows gives no file."""
    path = to / f"{split}.jsonl"
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in client.lines(f"/api/revisions/{digest}/rows", form=kind, split=split):
            file.write(f"{line}\n")
            count += 1
    if count == 0:
        path.unlink()
        return 0
    to_parquet(path)
    return count


def to_parquet(path: Path) -> None:
    """Beside a JSONL file. Raises InvalidRequest for rows whose messages no one table can hold."""
    import pyarrow as pa  # a second of loading that only an export should pay
    import pyarrow.parquet as pq

    try:
        # Not Arrow's own reader of JSON, which takes texts that look like dates for dates.
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        table = pa.Table.from_pylist(rows)
        # A split whose prompts offered no tools has the column all the same, of the same type as the other's.
        tools = table.schema.get_field_index("tools")
        if tools >= 0:
            table = table.set_column(tools, "tools", table["tools"].cast(pa.string()))
        pq.write_table(table, path.with_suffix(".parquet"))
    except pa.ArrowException as error:
        raise InvalidRequest(f"{path.name} is written, but no Parquet file can hold its rows: {error}") from error


def _hub_token(repository: str | None) -> str:
    """Whose account pushes. Raises InvalidRequest before anything is written."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if not repository:
        raise InvalidRequest("--public says who may read what --push-to-hub pushes: name its repository")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InvalidRequest(f"--push-to-hub wants OWNER/NAME, not {repository!r}") from error
    token = get_token()
    if not token:
        raise InvalidRequest("--push-to-hub needs a token: set HF_TOKEN, or sign in with `hf auth login`")
    return token


def _push(folder: Path, repository: str, token: str, digest: str, *, private: bool) -> None:
    """The Parquet files, as splits of one dataset. Raises InvalidRequest when the hub refuses."""
    from datasets import Dataset, DatasetDict  # seconds of loading that only a push should pay
    from huggingface_hub.errors import HfHubHTTPError

    files = {split: folder / f"{split}.parquet" for split in ("train", "held_out")}
    held = DatasetDict({split: Dataset.from_parquet(str(path)) for split, path in files.items() if path.exists()})
    if not held:
        raise InvalidRequest("there is no row of this kind to push")
    message = f"Revision {digest}"
    try:
        held.push_to_hub(repository, private=private, token=token, commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise InvalidRequest(f"{folder} is written, but the hub did not take it: {error}") from error
    print_text(f"pushed to {repository}, {'private' if private else 'public'}")


def import_(
    project: Project,
    file: Annotated[Path, typer.Argument(help="A .jsonl, .csv or .parquet file.", exists=True, dir_okay=False)],
    name: Name = "golden",
    map_: Annotated[
        list[str] | None, typer.Option("--map", help="field=column, such as prompt=question; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would happen.")] = False,
) -> None:
    """Bring examples from a file into a dataset: every row, or none when one is bad."""
    mapping = _mapping(map_ or [])
    found = AdminClient(Settings()).upload(
        f"/api/p/{project}/datasets/{name}/imports",
        file.read_bytes(),
        file_name=file.name,
        mapping=json.dumps(mapping) if mapping else "",
        dry_run=str(dry_run).lower(),
    )
    print_text("; ".join(f"{field} from {column}" for field, column in found["mapping"].items()))
    for error in found["errors"][:SHOWN]:
        Console(highlight=False).print(f"row {error['row']} {error['message']}", markup=False, soft_wrap=True)
    if dry_run:
        print_text(_told(found["rows"], found["error_count"], found["repeats"]))
        if found["error_count"]:
            raise typer.Exit(1)
        return
    again = f", {found['duplicates']:,} of them there already or repeated" if found["duplicates"] else ""
    print_text(f"{found['imported']:,} examples imported into {project}/{name}{again}; the next build has them.")


def _told(rows: int, errors: int, repeats: int) -> str:
    return f"{rows:,} rows, {errors:,} bad, {repeats:,} repeated. Nothing was imported: this was a dry run."


def _mapping(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        field, separator, column = pair.partition("=")
        if not separator:
            raise InvalidRequest(f"--map wants field=column, not {pair!r}")
        found[field] = column
    return found
