"""What a user calls a model or a data set -> its folder: a shipped one, a path, a repository on the hub."""

import re
import warnings
from pathlib import Path
from typing import Any

from worldvla.files import ASSETS

LEFT_OUT = ["*.pth", "*.pt", "*.bin", "*.h5", "*.msgpack", "*.mp4"]
"""Optimiser states (56 GB beside 14 GB of weights) and pickles."""
LOCAL = ("out", "data", "results", "runs")
"""Folders that our commands write to: below them nothing is taken for a name on the hub."""


def locate(name: Path | str) -> Path:
    """Return the folder of a model: `tabletop` or `libero`, which are shipped, a path, `ORG/NAME` on the hub.

    `ORG/NAME` is read as a name on the hub only if there is no folder ORG; `hf://ORG/NAME/FOLDER` always is.
    `@REVISION` behind either: a tag, branch or commit. A download shows its progress and goes on where it
    stopped.
    """
    text, _, revision = str(name).partition("@")
    if Path(name).exists():  # a folder may be called so
        text, revision = str(name), ""
    shipped = sorted(path.parent.name for path in ASSETS.glob("*/manifest.json"))
    if text in shipped and not revision:
        return ASSETS / text
    if marked := re.match("hf:/+", text):  # a Path has folded the two slashes into one
        return _fetch(text[marked.end() :], revision)
    if (path := Path(text)).exists() and not revision:
        return path
    if _is_id(text):
        return _fetch(text, revision)
    raise FileNotFoundError(
        f"no folder {name} (read as a path from {Path.cwd()}): expected a folder, ORG/NAME or "
        f"hf://ORG/NAME/FOLDER on the hub, or a shipped model ({', '.join(shipped)})"
    )


def _is_id(text: str) -> bool:
    first = text.split("/")[0]
    return (
        bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text)) and first not in LOCAL and not Path(first).exists()
    )


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder as the repository `name`, which is made if it is not there; return its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by worldvla push")
    except Exception as error:  # of a dozen classes: network, permissions, names
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the hub does not take {name} ({reason}): check `hf auth login` and the network, and repeat "
            "the command"
        ) from error
    return address


def fetch_data(name: Path | str) -> Path:
    """Return the folder of a data set: a path as it is, or the download of `ORG/NAME@REVISION` on the hub.

    A download's folder is named by its commit.
    """
    repo, at, revision = str(name).partition("@")
    if not at or Path(name).exists() or not _is_id(repo):
        return Path(name)
    if not revision:
        raise ValueError(f"{name} has no revision: name a tag, branch or commit, such as {repo}@v3.0")
    from huggingface_hub import snapshot_download

    folders = ["meta/*", "data/*", "videos/*", "images/*"]
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=folders))
    except Exception as error:  # of a dozen classes: network, permissions, names
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"no folder {name}, and the hub does not give {repo} at revision "
            f"{revision} ({reason}): check name, revision and network, or pass a folder"
        ) from error


def origin(path: Path) -> tuple[str, str]:
    """Return ORG/NAME and the commit of a folder or file in the hub's cache, of any other two empty texts."""
    folder = path.resolve() if path.is_dir() else path.parent.resolve()  # a file is a link to a blob
    for snapshot in (folder, *folder.parents):
        kind, *name = snapshot.parents[1].name.split("--") if len(snapshot.parts) > 2 else [""]
        if snapshot.parent.name == "snapshots" and kind in ("datasets", "models") and name:
            return "/".join(name), snapshot.name
    return "", ""


def _fetch(name: str, revision: str = "") -> Path:
    """Return the folder of `ORG/NAME[/FOLDER]`, downloaded; a repository of several models needs FOLDER."""
    from huggingface_hub import list_repo_files, snapshot_download

    parts = name.split("/")
    repo, folder = "/".join(parts[:2]), "/".join(parts[2:]).strip("/")
    at: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        files = list_repo_files(repo, **at)
        models = sorted({f.rpartition("/")[0] for f in files if f.endswith((".safetensors", ".ckpt"))})
        is_there = any(f.startswith(f"{folder}/") for f in files) if folder else "" in models
        if not is_there:
            raise ValueError(f"it has no {folder or 'model of its own'}; its folders are {', '.join(models)}")
        patterns = [f"{folder}/*"] if folder else None
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=LEFT_OUT, **at)) / folder
    except Exception as error:  # of a dozen classes: network, permissions, names
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(error, ValueError) and (kept := _downloaded(repo, folder, at)) is not None:
            text = f"the hub does not give {repo} now ({reason}): its earlier download {kept} is used"
            warnings.warn(text, stacklevel=3)
            return kept
        raise OSError(
            f"{name} was read as a name on the hub, which does not give {repo}: {reason}; check the name, "
            "the network and `hf auth login` and repeat the command, or pass a folder"
        ) from error


def _downloaded(repo: str, folder: str, at: dict[str, Any]) -> Path | None:
    """Return the folder of an earlier download, None without one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(repo, local_files_only=True, **at)) / folder
    except LocalEntryNotFoundError:
        return None
    return path if path.is_dir() else None
