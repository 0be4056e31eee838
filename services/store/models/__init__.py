"""Every table, by part. No foreign key points at `interaction`: its partitions are dropped whole."""

from sqlalchemy import DDL, event

from services.store.base import Base
from services.store.models.golden import *  # noqa: F403
from services.store.models.learning import *  # noqa: F403
from services.store.models.ledger import *  # noqa: F403
from services.store.models.people import *  # noqa: F403
from services.store.models.review import *  # noqa: F403
from services.store.models.rollout import *  # noqa: F403
from services.store.models.traffic import *  # noqa: F403
from services.store.models.webhooks import *  # noqa: F403

event.listen(Base.metadata, "before_create", DDL("CREATE EXTENSION IF NOT EXISTS vector"))  # type: ignore[no-untyped-call]
