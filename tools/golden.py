"""Write every file of tests/golden anew; a changed one needs a sentence in the commit.

python tools/golden.py
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"

for script in sorted(TESTS.glob("golden_*.py")):
    print(script.name)
    subprocess.run([sys.executable, str(script)], check=True, cwd=TESTS.parent)
