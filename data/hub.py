"""Data sets of the Hugging Face hub, or a folder in its form, streamed."""

from typing import Any

from data.errors import DataError

HUB = "hf:"
"""What a source of this kind begins with."""


def open_hub(source: str) -> Any:
    """Return the streaming dataset of `hf:NAME[@CONFIGURATION][:SPLIT]`, NAME on the hub or a folder."""
    import datasets  # seconds to import, and only this kind of source needs it

    name, _, split = source.removeprefix(HUB).partition(":")
    name, _, configuration = name.partition("@")
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
    except Exception as error:  # the library and its transports raise many unrelated classes
        raise DataError(
            f"source {source} cannot be opened: {type(error).__name__}: {error}; "
            f"check the name, the network, and the form {HUB}NAME[@CONFIGURATION][:SPLIT]"
        ) from error
