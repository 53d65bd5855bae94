"""The rules that hold the repository together: the direction of imports, ids, prints, ASCII, dependencies.

Run: pytest tests/test_repo.py
"""

import ast
import contextlib
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "worldvla"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted((ROOT / "tests").glob("*.py")) + sorted((ROOT / "paper").glob("*.py"))

# What the files of a folder may import besides their own folder and the ground, which imports none of ours.
GROUND = {"config", "vocab", "batch", "files", "machine", "progress"}
MAY_IMPORT = {
    "tokenizers": set(),
    "model": set(),
    "sim": set(),
    "image": set(),
    "robot": set(),
    "track": set(),
    "video": set(),
    "cluster": set(),
    "data": {"tokenizers", "cluster", "sim", "image", "robot", "video", "published.hub"},
    "infer": {"model", "tokenizers", "data.sample", "published.hub"},
    "published": {"model", "tokenizers"},
    "train": {"model", "tokenizers", "data", "track", "video"},
    "eval": {"infer", "cluster", "sim", "data", "tokenizers", "image", "video"}
    | {"serve.protocol", "serve.client"},
    # The files of serve stand apart: a client needs the wire alone, the server a model too.
    "serve.protocol": set(),
    "serve.client": {"serve.protocol"},
    "serve.batcher": set(),
    "serve.exact": {"infer", "data.sample", "tokenizers"},
    "serve.server": {"image", "serve.protocol", "serve.batcher", "serve.exact", "infer"},
    "serve.play": {"infer", "sim", "data", "video"},
}
TOP = {"__init__", "__main__", "cli", "demo", "imagine", "improve", "rank", "recipes"}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> Iterator[str]:
    for node in _runtime(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(path: Path) -> str:
    """Return a file's name inside the package: `sim.libero.env`, `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _runtime(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below that are ever executed: all but what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from _runtime(child)


def _arrows() -> dict[str, set[str]]:
    """Return file -> the files of the package that it imports, also inside functions."""
    modules = {_module(path): path for path in MODULES}
    arrows = {}
    for module, path in modules.items():
        names = (name for name in _imports(path) if name.split(".")[0] == "worldvla")
        names = (name.removeprefix("worldvla").removeprefix(".") or "__init__" for name in names)
        arrows[module] = {name for name in names if name in modules}
    return arrows


def test_arrows_point_one_way() -> None:
    for module, targets in _arrows().items():
        if module in TOP or module.endswith(".__init__"):
            continue
        folder = ".".join(module.split(".")[: 2 if module.startswith("serve.") else 1])
        assert folder in MAY_IMPORT or folder in GROUND, f"{module} has no level: give it one in MAY_IMPORT"
        allowed = set() if folder in GROUND else MAY_IMPORT[folder] | GROUND | {folder}
        up = {t for t in targets if not any(f"{t}.".startswith(f"{name}.") for name in allowed)}
        assert not up, f"{module} imports {sorted(up)}; it may import {sorted(allowed)}"


def test_only_the_top_knows_both_policy_and_world() -> None:
    both = {name for name, targets in _arrows().items() if {"infer.policy", "infer.world"} <= targets}
    assert both == {"__init__", "improve", "rank"}


def test_no_files_import_each_other_in_a_circle() -> None:
    list(graphlib.TopologicalSorter(_arrows()).static_order())  # a CycleError names the files


def test_sim_runs_without_torch():
    modules = ", ".join(f"worldvla.{m}" for m in map(_module, MODULES) if m.startswith(("sim.", "machine")))
    code = f"import sys; sys.modules['torch'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _published_ids() -> set[int]:
    """Return the numbers of the id table that stand for nothing else (four and five digits)."""
    from worldvla.vocab import chameleon

    table = chameleon()
    numbers = {v for v in vars(table).values() if isinstance(v, int) and v > 8000}
    return numbers - {table.size, table.num_image_codes, table.num_text}  # sizes, not ids


def _is_id(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return bool({"id", "ids"} & set(name.split("_")))


def test_no_literal_ids_outside_the_vocabulary():
    published = _published_ids()
    paths = [p for p in SOURCES if p.name != "vocab.py" and p.parent.name != "tests"]
    for path, node in ((p, node) for p in paths for node in ast.walk(ast.parse(p.read_text()))):
        where = f"{_name(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Constant) and type(node.value) is int:
            assert node.value not in published, (
                f"{where}: {node.value} is an id of vocab.chameleon(); use its name"
            )
        operands = []
        if isinstance(node, ast.BinOp):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        literals = [
            o.value
            for o in operands
            if isinstance(o, ast.Constant) and isinstance(o.value, int) and o.value > 9
        ]
        assert not (literals and any(map(_is_id, operands))), f"{where}: literal {literals} meets an id"


PRINTERS = ("cli", "__main__")


def test_library_does_not_print():
    for path in [p for p in MODULES if not p.name.startswith(PRINTERS)]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        lines = [
            c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("print", "breakpoint")
        ]
        assert not lines, f"{_name(path)} prints in lines {lines}"


def test_library_swallows_no_exception_and_unpickles_nothing():
    boundaries = {"worldvla/cli.py", "worldvla/eval/workers.py", "worldvla/data/collect.py"}
    boundaries |= {"worldvla/serve/server.py", "worldvla/serve/batcher.py", "worldvla/serve/play/server.py"}
    boundaries |= {"worldvla/sim/libero/doctor.py"}  # a red line each
    for path in MODULES:
        handlers = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ExceptHandler)]
        for handler in handlers if _name(path) not in boundaries else ():
            caught = ast.unparse(handler.type) if handler.type else "everything"
            raises = any(isinstance(n, ast.Raise) for n in ast.walk(handler))
            broad = caught in ("everything", "Exception", "BaseException")
            assert raises or not broad, f"{_name(path)}:{handler.lineno} swallows {caught}"
        assert "pickle" not in set(_imports(path)), f"{_name(path)} imports pickle"


def test_versions_are_looked_up_in_one_place():
    users = {_name(path) for path in MODULES if any("importlib.metadata" in n for n in _imports(path))}
    assert users == {"worldvla/machine.py"}


def _text_files() -> list[Path]:
    names = ["Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt", ".ci/run"]
    found = (
        [ROOT / name for name in names]
        + sorted((ROOT / "docs").glob("*.md"))
        + sorted((ROOT / "runs").glob("*.sh"))
    )
    return found + SOURCES


def test_text_is_ascii():
    for path in _text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert line.isascii(), f"{_name(path)}:{number}: {line}"


def test_every_test_file_says_what_it_proves():
    for path in sorted((ROOT / "tests").glob("*.py")):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{_name(path)} has no docstring"


def test_dependencies_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def canonical(text: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", text)[0]).lower()

    declared = {canonical(r) for r in project["dependencies"]}
    owners = importlib.metadata.packages_distributions()
    foreign = {"libero", "robosuite", "ray"}  # extras
    for path in MODULES:
        for module in (
            {name.split(".")[0] for name in _imports(path)}
            - foreign
            - set(sys.stdlib_module_names)
            - {"worldvla"}
        ):
            names = {canonical(d) for d in owners.get(module, [module])}
            assert names & declared, f"{_name(path)} imports {module}, which pyproject.toml does not list"


def test_pinned_versions_install_on_every_python_3_11():
    """Debian 12 has 3.11.2. A version that wants a later one needs a marker."""
    checked = 0
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for name, version in pins:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra
            found = importlib.metadata.metadata(name).json
            if str(found["version"]).split("+")[0] == version:
                wanted = str(found.get("requires_python", ""))
                assert "3.11.2" in SpecifierSet(wanted), f"{name}=={version} wants Python {wanted}"
                checked += 1
    assert checked > 30


def test_no_package_index_is_hard_wired():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text, f"{name} names a host"
        assert "index-url" not in text, f"{name} chooses an index"


def test_console_script_exists():
    from worldvla.__main__ import main

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"worldvla": "worldvla.__main__:main"}
    assert callable(main)
