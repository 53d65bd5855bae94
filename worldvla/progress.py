"""The one progress bar, for whatever takes more than two seconds: on stderr, stdout is for results."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 60.0
"""Seconds between two lines in a log."""


class _Lines(Progress):
    """Of a log file: nothing moves there, so it gets a line a minute."""

    last = 0.0

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._line()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._line()

    def _line(self) -> None:
        now = time.monotonic()
        if now - (self.last or self.tasks[0].start_time or now) >= EVERY:
            self.last = now
            self.console.print(self.make_tasks_table(self.tasks))


def progress_bar(console: Console | None = None, **options: Any) -> Progress:
    """Return a bar with description, n/N, time spent and time left; `options` are rich's."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console(stderr=True)
    kind = Progress if console.is_terminal else _Lines
    return kind(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, **options)
