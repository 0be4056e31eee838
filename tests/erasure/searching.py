"""Looking for a text in every place a text can be: all columns of all tables, all files of a home."""

from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session

WORDS = ("text", "varchar", "bpchar", "name", "json", "jsonb", "bytea", "_text", "_varchar", "xml", "tsvector")


def columns(session: Session) -> list[tuple[str, str]]:
    """(table, column) of everything that can hold words; a partition's are its parent's."""
    query = text("""
        SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        JOIN pg_type t ON t.oid = a.atttypid
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
            AND a.attnum > 0 AND NOT a.attisdropped AND (t.typname = ANY(:words) OR t.typtype IN ('e', 'd'))
        ORDER BY 1, 2
    """)
    return [(row.relname, row.attname) for row in session.execute(query, {"words": list(WORDS)})]


def tables_with(session: Session, words: str) -> list[tuple[str, str]]:
    """Where the words stand; a column of bytes is written in hexadecimal."""
    found = []
    for table, column in columns(session):
        value = f'"{column}"::text'
        either = f"strpos({value}, :words) > 0 OR strpos({value}, :bytes) > 0"
        query = text(f'SELECT count(*) FROM "{table}" WHERE {either}')
        if session.scalar(query, {"words": words, "bytes": words.encode().hex()}):
            found.append((table, column))
    return found


def files_with(home: Path, words: str) -> list[str]:
    """Files below the home that hold the words; the model's own are left out."""
    return [
        str(path.relative_to(home))
        for path in sorted(home.rglob("*"))
        if path.is_file() and "model" not in path.relative_to(home).parts and words.encode() in path.read_bytes()
    ]
