"""The verb `doctor`; nothing heavy is imported before it runs."""

from dataclasses import dataclass
from pathlib import Path

EXIT_BROKEN = 3


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check versions, OpenGL and how the simulators behave, and say what to do; a red line: exit code 3."""

    quick: bool = False
    """Versions, machine and OpenGL alone: seconds."""
    json: Path | None = None
    """File for the result. Default: out/doctor.json, which records then cite; with --quick: none."""

    def run(self) -> int:
        from rich.console import Console
        from rich.text import Text

        from worldvla.files import write_json
        from worldvla.sim import doctor

        colours = {"ok": "green", "warning": "yellow", "bad": "red", "skipped": "dim"}
        console = Console(highlight=False, soft_wrap=True)
        checks: list[doctor.Check] = []
        with console.status("versions") as status:
            for check in doctor.examine(self.quick, status.update):
                checks.append(check)
                line = Text.assemble(
                    (f"{check.status:<8}", colours[check.status]), f"{check.name:<28}{check.found}"
                )
                console.print(line.append(f"   fix: {check.fix}" if check.fix else "", "bold"))
        report = doctor.report(checks, self.quick)
        path = self.json or (None if self.quick else doctor.LAST)
        if path is not None:
            write_json(path, report)
            console.print(f"written: {path}")
        return 0 if report["ok"] else EXIT_BROKEN
