# mujoco builds its names at import, where a type checker cannot see them.
from typing import Any

def __getattr__(name: str) -> Any: ...
