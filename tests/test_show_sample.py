"""`worldvla show-sample` prints every token of a sample, from a recipe's layout or from stores.

pytest tests/test_show_sample.py
"""

import json
import re
from pathlib import Path

import pytest
from tiny_run import tiny_config

from worldvla.cli import main
from worldvla.config import to_json


@pytest.mark.parametrize("mode", ["policy", "world"])
@pytest.mark.parametrize("name", ["tabletop", "libero_256_goal"])
def test_a_recipe_needs_no_files_when_faked(capsys: pytest.CaptureFixture[str], name: str, mode: str):
    main(["show-sample", name, "--mode", mode, "--fake", "--width", "240"])
    out = capsys.readouterr().out
    expected = re.search(r"(\d+) tokens, (\d+) of them targets", out)
    assert expected is not None
    lines = out.splitlines()[2:]
    last = max(int(line.split()[0]) for line in lines if line.split()[0].isdigit())
    assert last == int(expected[1]) - 1  # the closing separator stands alone on the last line
    assert lines[-1].split()[-1] == "sep"


@pytest.mark.parametrize("mode", ["policy", "world"])
def test_a_run_shows_what_its_loader_makes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
):
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny_config(root))))
    main(["show-sample", str(tmp_path), "--mode", mode, "--frame", "3", "--width", "200"])
    out = capsys.readouterr().out
    assert main(["show-sample", str(tmp_path), "--mode", mode, "--frame", "99999999"]) == 2
    assert "--frame 99999999: the stores hold frames 0 to " in capsys.readouterr().err
    assert f"tiny {mode}" in out
    assert ("do 0" if mode == "policy" else "go") in out
