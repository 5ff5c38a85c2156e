"""OUT/manifest.json: how a corpus was prepared, whether it is complete, and what it holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import PrepareConfig
from data.errors import DataError
from data.tokenizer import load_tokenizer

_VERSION = 1
_OWN_LEFTOVERS = {".lock", "manifest.json.tmp"}


@dataclass(frozen=True)
class Manifest:
    """What is known about a folder before work begins: its options, and what an earlier command left."""

    folder: Path
    options: dict[str, Any]
    stored: dict[str, Any] | None

    @property
    def complete(self) -> bool:
        """Whether an earlier command with the same options finished."""
        return self.stored is not None and self.stored["status"] == "complete"

    def write(self, *, status: str, **content: Any) -> None:
        """Replace the manifest."""
        temporary = self.folder / "manifest.json.tmp"
        record = {"version": _VERSION, "status": status, "options": self.options, **content}
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(self.folder / "manifest.json")


def options_of(config: PrepareConfig, *, tokenizer: str, name: str, extensions: list[str]) -> dict[str, Any]:
    """Return everything that decides the content of the shards; the number of workers does not."""
    if config.train_tokenizer is None:
        tokenizer_option = f"sha256:{load_tokenizer(tokenizer).sha256}"
    else:
        tokenizer_option = f"byte-level BPE of {config.train_tokenizer} trained on the sources"
    return {
        "sources": list(config.sources),
        "tokenizer": tokenizer_option,
        "validation_fraction": config.validation_fraction,
        "text_key": config.text_key,
        "split_fused_rate": config.split_fused_rate,
        "extensions": extensions,
        "name": name,
    }


def open_manifest(folder: Path, options: dict[str, Any]) -> Manifest:
    """Read what is in the folder. Raises DataError if it was prepared differently, or is not ours."""
    path = folder / "manifest.json"
    if not path.is_file():
        foreign = sorted(file.name for file in folder.iterdir() if file.name not in _OWN_LEFTOVERS)
        if foreign:
            raise DataError(
                f"{folder} is not empty ({', '.join(foreign[:3])}) and has no manifest.json; use a new folder"
            )
        return Manifest(folder, options, None)
    try:
        stored = json.loads(path.read_text())
        before = stored["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a manifest of data.prepare ({error}); delete {folder} and prepare again"
        ) from error
    differing = [key for key in options if options[key] != before.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {options[key]!r}" for key in differing)
        raise DataError(
            f"{folder} was prepared with other options: {changes}; use another folder or delete it"
        )
    return Manifest(folder, options, stored)
