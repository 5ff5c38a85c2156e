"""Writes docs/configs.md's tables from the configuration dataclasses and the comments beside their fields:

python -m tests.golden.config_reference
"""

import ast
import dataclasses
import enum
import types
import typing
from pathlib import Path

import data.config
import model.config
import parallel.cluster
import parallel.config
import train.config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configs.md"
MARK = "<!-- generated: python -m tests.golden.config_reference -->"
MODULES = (train.config, model.config, parallel.config, parallel.cluster, data.config)


def reference() -> str:
    """Return one table per section, root first, in the order in which sections are met."""
    sections, queue = [], [train.config.RunConfig]
    while queue:
        section = queue.pop(0)
        if section in sections:
            continue
        sections.append(section)
        hints = typing.get_type_hints(section)
        queue += [found for each in dataclasses.fields(section) for found in _sections(hints[each.name])]
    return "\n\n".join(_table(section) for section in sections) + "\n"


def page() -> str:
    """Return docs/configs.md with the tables as the code says they are."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return f"{head}{MARK}\n\n{reference()}"


def _table(section: type) -> str:
    if dataclasses.is_dataclass(section.__base__):  # made from a section whose keys have their own table
        return f"### {section.__name__}\n\n{section.__doc__}"
    comments = _comments(section)
    hints = typing.get_type_hints(section)
    rows = [
        f"| `{each.name}` | {_type_name(hints[each.name])} | {_default(each)} | {comments[each.name]} |"
        for each in dataclasses.fields(section)
    ]
    doc = (section.__doc__ or "").strip().splitlines()[0]
    return "\n".join(
        [
            f"### {section.__name__}",
            "",
            doc,
            "",
            "| key | type | default | |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def _comments(section: type) -> dict[str, str]:
    path = Path(next(m for m in MODULES if m.__name__ == section.__module__).__file__ or "")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    (node,) = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == section.__name__]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    found = {}
    for each in fields:
        _, mark, comment = lines[(each.end_lineno or 1) - 1].partition("  # ")
        found[typing.cast(ast.Name, each.target).id] = comment.replace("|", "\\|") if mark else ""
    return found


def _sections(hint: object) -> list[type]:
    parts = [hint, *typing.get_args(hint)]
    return [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _type_name(hint: object) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ", ".join(f"`{member.name}`" for member in hint)
    if arguments := typing.get_args(hint):
        name = getattr(typing.get_origin(hint), "__name__", str(hint))
        return f"{name} of {_type_name(arguments[-1])}"
    name = getattr(hint, "__name__", str(hint))
    return f"[{name}](#{name.lower()})" if dataclasses.is_dataclass(hint) else name


def _default(each: dataclasses.Field) -> str:
    if each.default is not dataclasses.MISSING:
        value = each.default
        return "required" if value == "???" else f"`{'null' if value is None else value}`"
    value = each.default_factory() if each.default_factory is not dataclasses.MISSING else None
    return "" if dataclasses.is_dataclass(value) or not isinstance(value, list | dict) or value else "empty"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
