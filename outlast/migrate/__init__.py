"""Moving threads between LangGraph's checkpointers and Dapr state stores, in and out again.

    with opened("postgres://…") as source, opened("statestore") as target:
        for report in migrate(source, target):
            print(report)

Every thread is copied with all checkpoints, namespaces, parents, pending writes and metadata, the oldest checkpoint
first, and read back and compared. Whatever is cut short, calling again completes it.
"""

from outlast.migrate.copying import ThreadReport, migrate
from outlast.migrate.opening import opened
from outlast.migrate.sides import MigrationError

__all__ = ["MigrationError", "ThreadReport", "migrate", "opened"]
