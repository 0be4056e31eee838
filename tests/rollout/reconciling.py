"""`python -m tests.rollout.reconciling DATABASE SOCKET ARTIFACTS`: one step of a fresh reconciler, to be killed."""

import sys
from pathlib import Path

from engine.sync_client import SyncEngineClient
from services.store.base import make_sessions
from worker.rollout.reconcile import Reconciler

if __name__ == "__main__":
    database, socket, artifacts = sys.argv[1:]
    with SyncEngineClient(socket) as client:
        Reconciler(make_sessions(database), client, Path(artifacts)).step()
