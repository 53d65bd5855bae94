# An optional extra, which type checking does without.
from typing import Any

def __getattr__(name: str) -> Any: ...
