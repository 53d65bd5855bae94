"""The one progress bar, for whatever takes more than two seconds: on stderr, stdout is for results."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(console: Console | None = None, **options: Any) -> Progress:
    """Return a bar with description, n/N, time spent and time left; `options` are rich's."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console(stderr=True)
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, **options)
