# An optional extra, which type checking does without.
from typing import Any

class RayError(Exception): ...

class RayTaskError(RayError):
    cause: Exception

def __getattr__(name: str) -> Any: ...
