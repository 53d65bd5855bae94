"""How large the house is: lines and files by folder, and how long the functions of the package are.

python -m paper.size        # part of `make check`; for orientation, nothing is refused
"""

import ast
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Print a line a folder, of the files that are in git."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True)
    folders: dict[str, list[int]] = defaultdict(list)
    functions: list[int] = []
    for path in map(Path, listed.stdout.split()):
        text = (ROOT / path).read_text()
        folders["/".join(path.parts[:-1][:2]) or "."].append(text.count("\n"))
        if path.parts[0] == "worldvla":
            nodes = [
                n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            functions += [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes]
    for folder, lines in sorted(folders.items()):
        print(f"{folder:<32}{sum(lines):>7} lines{len(lines):>5} files")
    package = sum(sum(lines) for folder, lines in folders.items() if folder.startswith("worldvla"))
    longest, median = max(functions), statistics.median(functions)
    print(
        f"worldvla: {package} lines, {len(functions)} functions, median {median:g} lines, longest {longest}"
    )


if __name__ == "__main__":
    main()
