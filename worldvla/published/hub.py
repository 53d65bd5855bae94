"""A local folder, or `ORG/NAME[/FOLDER]` of the Hugging Face hub -> a local folder."""

import warnings
from pathlib import Path

LEFT_OUT = ["*.pth", "*.pt", "*.bin", "*.h5", "*.msgpack", "*.mp4"]
"""Optimiser states (56 GB beside 14 GB of weights) and pickles."""
OURS = ("", ".", "..", "~", "out", "data", "results")
"""A path that starts with one of these is never a name on the hub."""


def fetch(source: Path | str) -> Path:
    """Return the folder; what is on the hub alone is downloaded, with progress, going on where it stopped.

    A repository of several models needs the folder of one of them.
    """
    text = str(source)
    name = text.removeprefix("hf://")
    parts = name.split("/")
    is_local = Path(text).exists() or len(parts) < 2 or parts[0] in OURS or Path(parts[0]).exists()
    if is_local and name == text:
        return Path(source)
    from huggingface_hub import list_repo_files, snapshot_download

    repo, folder = "/".join(parts[:2]), "/".join(parts[2:]).strip("/")
    try:
        files = list_repo_files(repo)
        models = sorted({f.rpartition("/")[0] for f in files if f.endswith((".safetensors", ".ckpt"))})
        if not any(f.startswith(f"{folder}/") or not folder for f in files) or (
            not folder and "" not in models
        ):
            raise ValueError(f"it has no {folder or 'model of its own'}; its folders are {', '.join(models)}")
        patterns = [f"{folder}/*"] if folder else None
        root = snapshot_download(repo, allow_patterns=patterns, ignore_patterns=LEFT_OUT)
    except Exception as error:  # of a dozen classes: network, permissions, names
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(error, ValueError) and (kept := _kept(repo, folder)) is not None:
            said = f"the hub gives no {repo} now ({reason}): {kept}, downloaded before, is used"
            warnings.warn(said, stacklevel=2)
            return kept
        raise OSError(
            f"no local folder {text}, and the hub gives no {repo}: {reason}; check the name, the network and "
            "`hf auth login`, or pass a folder; the same command goes on"
        ) from error
    return Path(root) / folder


def _kept(repo: str, folder: str) -> Path | None:
    """Return the folder of a download that is still there, None without one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(repo, local_files_only=True)) / folder
    except LocalEntryNotFoundError:
        return None
    return path if path.is_dir() else None
