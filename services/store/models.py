"""Every table, by part. No foreign key points at `interaction`: its partitions are dropped whole."""

from sqlalchemy import DDL, event

from services.store.base import Base
from services.store.tables.golden import *  # noqa: F403
from services.store.tables.learning import *  # noqa: F403
from services.store.tables.ledger import *  # noqa: F403
from services.store.tables.people import *  # noqa: F403
from services.store.tables.review import *  # noqa: F403
from services.store.tables.rollout import *  # noqa: F403
from services.store.tables.traffic import *  # noqa: F403
from services.store.tables.webhooks import *  # noqa: F403

event.listen(Base.metadata, "before_create", DDL("CREATE EXTENSION IF NOT EXISTS vector"))  # type: ignore[no-untyped-call]
