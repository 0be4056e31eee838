"""What the tables stand on besides types: the vector extension, and the function whose result full-text search indexes.

Migrations have copies of their own: what a release created stays what it was.
"""

from sqlalchemy import DDL, event

from services.store.base import Base

# One document an interaction: the texts of its prompt and its answer, the first 100,000 characters of them (a tsvector
# ends at 1 MB), and a word that names the project, so that the index answers for one project without reading what
# others wrote. That word only saves time: queries compare `project_id` as well.
DOCUMENT = r"""
CREATE OR REPLACE FUNCTION whet_document(project_id uuid, messages jsonb, output text) RETURNS tsvector
LANGUAGE sql IMMUTABLE PARALLEL SAFE COST 2000 AS $$
    SELECT to_tsvector('pg_catalog.simple'::regconfig, left(concat_ws(' ',
        output,
        (SELECT string_agg(said #>> '{}', ' ')
            FROM jsonb_path_query(messages, '$[*].content[*] ? (@.type() == "string")') AS said),
        (SELECT string_agg(said #>> '{}', ' ')
            FROM jsonb_path_query(messages, '$[*].content[*].text ? (@.type() == "string")') AS said)
    ), 100000)) || array_to_tsvector(ARRAY['project' || replace(coalesce(project_id::text, ''), '-', '')])
$$
"""

event.listen(Base.metadata, "before_create", DDL("CREATE EXTENSION IF NOT EXISTS vector"))  # type: ignore[no-untyped-call]
event.listen(Base.metadata, "before_create", DDL(DOCUMENT.replace("%", "%%")))  # type: ignore[no-untyped-call]
