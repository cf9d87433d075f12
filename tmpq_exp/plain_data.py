"""Reading JSON and YAML that anybody may have written: plain data or a ``ValueError``, whatever the text is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def parse_json(text: str | bytes) -> Any:
    """JSON as plain data.

    Raises:
        ValueError: If it is none, is no UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The same where an object is expected.

    Raises:
        ValueError: See ``parse_json``; also for any other JSON.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it must hold a JSON object, found {type(value).__name__}")
    return value


class _FlatLoader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader without aliases, with which a few lines can stand for terabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose content is a mapping, as plain data; interpolations (``${...}``) stay text.

    Raises:
        ValueError: If it cannot be read, is no YAML, or is no mapping; the file is named.
    """
    try:
        with path.open(encoding="utf-8") as file:
            value = yaml.load(file, Loader=_FlatLoader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is no YAML ({reason})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no configuration of this program")
    return {str(key): entry for key, entry in value.items()}
