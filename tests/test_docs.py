"""What README.md and docs/ promise: commands have their options, links resolve, the snippet runs from a
wheel, and the tree names what is on the disk. `make check` builds the site.

Run: pytest tests/test_docs.py
"""

import ast
import contextlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from policy_server import policy_server

import worldvla
from worldvla.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TAKE_RECIPE = ("train", "config", "plan", "show-sample")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(text: str) -> list[list[str]]:
    """Return the words of every `worldvla ...` command in the text's code blocks, comments left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^|/|-m )worldvla ([^#]*)", line) for line in lines]
    return [match[1].split() for match in found if match]


@cache
def help_of(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        assert main([*words, "--help"]) == 0
    return out.getvalue()


@pytest.mark.parametrize("path", [p for p in PAGES if commands(p.read_text())], ids=name)
def test_commands_have_their_verbs_recipes_and_options(path: Path) -> None:
    for verb, *rest in commands(path.read_text()):
        assert re.search(rf"^  {verb} ", help_of(), re.MULTILINE), f"{name(path)}: no verb {verb}"
        words = [verb, rest[0]] if verb in TAKE_RECIPE and rest and rest[0].islower() else [verb]
        for option in [word for word in rest if word.startswith("--")]:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(*words)), (
                f"{name(path)}: {verb} has no {option}"
            )


def test_links_of_the_readme_resolve() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), f"README.md names {link}, which does not exist"


@pytest.mark.parametrize("repository", ["", "https://host/us/worldvla"])
def test_the_long_description_has_no_relative_links(repository: str) -> None:
    """`make dist` makes them absolute, or text where it knows no address, by its sed script."""
    words = ["make", "--dry-run", "dist", f"REPOSITORY={repository}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    script = re.search(r"sed -E '(.*)' README.md", done.stdout)
    assert script, done.stdout
    page = subprocess.run(
        ["sed", "-E", script[1]], input=README, capture_output=True, text=True, check=True
    ).stdout
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert all(link.startswith("https://") for link in links), links
    assert (len(links) > 5) == bool(repository)


def test_pages_that_the_sources_name_exist() -> None:
    sources = [
        *(ROOT / "worldvla").rglob("*.py"),
        *(ROOT / "paper").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
    ]
    for path in [*sources, ROOT / "CHANGELOG.md", ROOT / "Makefile"]:
        for page in re.findall(r"\b(?:docs|paper)/[\w/]+\.(?:md|svg|gif|py)\b", path.read_text()):
            assert (ROOT / page).exists(), f"{name(path)} names {page}, which does not exist"


def test_the_tree_of_the_readme_is_the_disk() -> None:
    """Every file and folder at the package's top is named; what is named below it exists."""
    lines = re.search(r"^worldvla/\n(.*?)^\S", README, re.DOTALL | re.MULTILINE)
    assert lines, "README.md has no tree that starts with 'worldvla/'"
    top, folder = set(), ""
    for line in lines[1].splitlines():
        words = re.findall(r"[\w/]+(?:\.py|/)(?= |$)", line.strip().split("   ")[0])
        if line.startswith("    "):
            assert all((ROOT / "worldvla" / folder / word).exists() for word in words), line
        else:
            top |= set(words)
            folder = words[0]
    disk = {p.name for p in (ROOT / "worldvla").glob("*.py")} - {"__main__.py"}
    disk |= {f"{p.parent.name}/" for p in (ROOT / "worldvla").glob("*/*.py")}
    assert top == disk, f"README lacks {sorted(disk - top)}; README invents {sorted(top - disk)}"


def test_the_readme_fits_a_screen_wide_and_a_minute_long() -> None:
    assert len(README.splitlines()) < 120
    assert max(map(len, README.splitlines())) <= 100


def test_the_wheel_is_the_package_alone_and_runs_the_snippet_of_the_readme(tmp_path: Path) -> None:
    """In an empty folder, with nothing of the checkout in reach."""
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(ROOT / "worldvla", source / "worldvla", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "paper/__init__.py",
        "tests/conftest.py",
    ):
        (source / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    files = _files(source / "worldvla")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, source], check=True, capture_output=True)
    assert _files(site / "worldvla") == files
    assert not {"paper", "tests", "docs", "runs"} & {p.name for p in site.iterdir()}
    code = README.split("```python\n")[1].split("```")[0]
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(worldvla.__file__)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome, file = done.stdout.splitlines()
    assert outcome == "success (64, 64, 3)"
    assert Path(file).is_relative_to(site)


ASK = """
import sys
import numpy as np
from worldvla.robot import Limits
from worldvla.serve.client import Client

picture = np.full((4, 4, 3), 3, np.uint8)
with Client("ws://" + sys.argv[1]) as client:
    answer = client.infer({"agentview": picture, "state": np.full(8, 0.25), "prompt": "go"})
print(answer["actions"].shape, client.metadata["name"], "torch" in sys.modules)
"""


def test_the_wheel_of_the_client_talks_to_a_server_without_torch(tmp_path: Path) -> None:
    """In a venv with what it declares alone, nothing of the checkout in reach. Python 3.10 reads it."""
    for folder in ("client", "worldvla"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "assets")
        )
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", tmp_path, tmp_path / "client"], check=True, capture_output=True)
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    sources = [p for p in site.rglob("*.py") if "worldvla" in p.parts]
    names = {p.relative_to(site).as_posix() for p in sources}
    assert names == {
        f"worldvla/{n}.py" for n in ("__init__", "robot", "serve/__init__", "serve/client", "serve/protocol")
    }
    for source in sources:
        ast.parse(source.read_text(), feature_version=(3, 10))
    (told,) = importlib.metadata.distributions(name="worldvla-client", path=[str(site)])
    assert told.version == worldvla.__version__
    packages = [re.match(r"[a-z]+", line) for line in told.requires or ()]
    for name in [*(match[0] for match in packages if match), "numpy.libs"]:
        (site / name).symlink_to(Path(np.__file__).parents[1] / name)
    with policy_server() as at:
        words = [tmp_path / "env/bin/python", "-I", "-c", ASK, at]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "(5, 7) right False\n", done.stderr


def test_the_development_container_is_a_stage_of_the_dockerfile() -> None:
    settings = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    stages = re.findall(r"^FROM \S+(?: AS (\w+))?$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert settings["build"]["target"] in stages
    assert stages[-1] == "", "`docker build .` makes the last stage, which must stay the server"
    target = settings["postCreateCommand"].removeprefix("make ")
    assert target == ".venv/.installed"
    assert "STAMP := $(VENV)/.installed" in (ROOT / "Makefile").read_text()


def _files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.suffix != ".pyc"}
