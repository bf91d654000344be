"""Progress bars, on standard error, for whatever takes more than two seconds."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {
    "rollout/success_rate": "success",
    "eval/success_rate": "eval",
    "rollout/return_mean": "return",
    "bc/loss": "loss",
    "outcome/loss": "loss",
    "energy/loss": "loss",
    "validation/explained_variance": "explained",
    "time/samples_per_s": "samples/s",
    "time/timesteps_per_s": "steps/s",
}


class ProgressBar:
    """A bar with the metrics people watch; silent unless `shown`."""

    def __init__(self, name: str, total: int, done: int = 0, *, shown: bool = True) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._progress.add_task(name, total=total, completed=done, figures="")
        self._figures: dict[str, str] = {}

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show `done` and the newest of the metrics."""
        self._figures |= {SHOWN[name]: f"{value:.3g}" for name, value in metrics.items() if name in SHOWN}
        figures = " ".join(f"{name} {value}" for name, value in self._figures.items())
        self._progress.update(self._task, completed=done, figures=figures)

    def note(self, text: str) -> None:
        """Show `text`, what is being worked at."""
        self._progress.update(self._task, figures=text)

    def advance(self, n: int) -> None:
        """Add `n` to what is done."""
        self._progress.advance(self._task, n)
