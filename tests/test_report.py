"""The page is one file that needs nothing else, shows what the records say, and lets no text of a record
become markup.

Run: pytest tests/test_report.py
"""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldvla.eval.page import write_page
from worldvla.eval.stats import count
from worldvla.eval.tokens import code_colors
from worldvla.video import encode_mp4, side_by_side

VOID = {"meta", "img", "br", "link"}


class Balance(html.parser.HTMLParser):
    """Fails when a tag is closed that was not open last."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes {self.stack}"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    directory = tmp_path / "eval"
    (directory / "videos").mkdir(parents=True)
    (directory / "videos" / "00_00.mp4").write_bytes(encode_mp4([side_by_side([frame, frame])] * 3, 12.5))
    outcomes = [
        {"task": 0, "init": 0, "status": "success", "grasped": True, "steps": 9, "video": "videos/00_00.mp4"},
        {
            "task": 0,
            "init": 1,
            "status": "error",
            "grasped": False,
            "steps": 2,
            "reason": "<b>x",
            "video": "",
        },
        {"task": 0, "init": 2, "status": "fail", "grasped": True, "steps": 9, "video": ""},
    ]
    record = {
        "suite": "tabletop_object",
        "checkpoint": {"name": "tiny", "step": 1500, "parameters": 2_500_000},
        **count(outcomes),
        "seed": 0,
        "protocol": {"views": {"agentview": [64, 64]}, "initial_states": "0..2 of each task", "executed": 5},
        "tasks": [{"index": 0, "name": "a", "instruction": "lift <script>", **count(outcomes)}],
        "outcomes": outcomes,
    }
    (directory / "record.json").write_text(json.dumps(record))
    return directory


def test_the_page_is_one_whole_file(evaluation: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path / "out" / "index.html", "A & B", evaluations=[evaluation]).read_text()
    parser = Balance()
    parser.feed(page)
    assert not parser.stack
    assert not re.findall(r"(?:src|href)=.?(?!data:)[\w./]", page)
    assert "://" not in re.sub(r"base64,[\w+/=]+", "", page)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html"]


def test_numbers_and_texts_are_those_of_the_record(evaluation: Path, tmp_path: Path) -> None:
    random = {
        **json.loads((evaluation / "record.json").read_text()),
        "checkpoint": {"name": "random"},
        "successes": 0,
    }
    page = write_page(tmp_path / "a.html", "A", evaluations=[evaluation], baselines=[random]).read_text()
    assert "1 of 2" in page
    assert "1 errors" in page
    assert "random 0&nbsp;%" in page
    assert "2.5 million parameters, step 1,500 of its last training run" in page
    assert page.count("data:video/mp4") == 1
    assert "lift &lt;script&gt;" in page
    assert "lift <script>" not in page


def test_the_page_says_what_it_shows_and_lets_the_reader_pause(evaluation: Path, tmp_path: Path) -> None:
    random = json.loads((evaluation / "record.json").read_text())
    page = write_page(tmp_path / "a.html", "A", evaluations=[evaluation], baselines=[random]).read_text()
    for words in (
        "As a policy it reads",
        "As a world model it reads",
        "tabletop simulated by MuJoCo",
        "orange tick",
    ):
        assert words in page
    assert "<video controls loop" in page
    assert "autoplay" not in page
    assert "prefers-reduced-motion" in page
    assert "Pause all videos" in page
    assert "{&#39;" not in page  # no dump of a Python value


def test_a_directory_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"record\.json"):
        write_page(tmp_path / "a.html", "A", evaluations=[tmp_path])
    assert not (tmp_path / "a.html").exists()


def test_pixels_stay_squares() -> None:
    rng = np.random.default_rng(0)
    big, small = (rng.integers(0, 256, (n, n, 3), dtype=np.uint8) for n in (64, 32))
    picture = side_by_side([big, small])
    assert picture.shape == (256, 520, 3)
    np.testing.assert_array_equal(picture[::4, :256:4], big)
    np.testing.assert_array_equal(picture[7::8, 271::8], small)
    assert side_by_side([big[:63, :63]]).shape[0] % 2 == 0


def test_alike_codes_have_alike_colours() -> None:
    codebook = np.linspace(-1, 1, 64)[:, None] * np.array([[1.0, 0.5]])
    colors = code_colors(codebook).astype(int)
    assert np.abs(np.diff(colors[:, 0])).max() <= 4
    assert np.ptp(colors[:, 0]) > 150
