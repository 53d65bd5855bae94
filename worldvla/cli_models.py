"""The verb `convert`: published checkpoints <-> ours; nothing heavy is imported before it runs."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from worldvla.cli_data import say


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Make one of our checkpoints of a published one, or the published layout of ours; see docs/MODELS.md."""

    source: tyro.conf.Positional[str]
    """A folder, or ORG/NAME/FOLDER on the hub; with --back a checkpoint or run directory of ours."""
    out: Path
    """Directory of the result."""
    release: str = ""
    """chameleon, worldvla_256, worldvla_512, rynnvla_256, rynnvla_world_512 or rynnvla_action_world_512."""
    suite: str = ""
    """Of a policy: the LIBERO suite it was trained on, which decides the length of its chunks."""
    tokenizer: str = ""
    """Folder, or ORG/NAME/FOLDER, of text_tokenizer.json and vqgan.ckpt. Default: SOURCE."""
    without_action_head: bool = False
    """Set the continuous head of a RynnVLA-002 policy aside; its discrete actions remain."""
    back: bool = False
    """Write the published layout of SOURCE."""
    like: Path | None = None
    """With --back, of a checkpoint that was trained on: the converted one that it came from."""

    def run(self) -> int:
        from worldvla.infer.convert import convert, convert_back
        from worldvla.recipes import libero

        if self.back:
            convert_back(Path(self.source), self.out, self.like)
            say(f"published layout: {self.out}")
            return 0
        remarks = convert(
            self.source,
            self.out,
            self.release,
            libero(),
            self.suite,
            self.tokenizer,
            self.without_action_head,
        )
        for line in remarks:
            say(line)
        say(f"model: {self.out}   next: worldvla eval {self.out} --suite {self.suite or 'SUITE'}")
        return 0
