"""Reads YAML with limits: aliases can expand ten lines to a gigabyte, or make a value that contains itself."""

from typing import Any

import yaml

MOST = 10_000  # values, with aliases expanded
DEEPEST = 50  # levels


class TooMuch(yaml.YAMLError):
    """The YAML at `key` (dotted; "" = all of it) exceeds a limit at `line`."""

    def __init__(self, key: str, what: str, line: int):
        super().__init__(f'"{key}" {what}' if key else f"it {what}")
        self.line = line


class BoundedLoader(yaml.SafeLoader):
    """Composes nodes and raises TooMuch at the first that exceeds a limit."""

    def __init__(self, text: str | bytes):
        super().__init__(text)
        self.path: list[str] = []  # the key of each level, "" for a list
        self.extents: dict[int, tuple[int, int]] = {}  # id of a complete node -> its number of values and of levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        named = isinstance(parent, yaml.MappingNode) and isinstance(index, yaml.ScalarNode)
        event = self.peek_event()
        line = (index if named else event).start_mark.line + 1
        self.path.append(index.value if named else "")
        self._check(len(self.extents), len(self.path), line)
        node = super().compose_node(parent, index)
        if id(node) not in self.extents:
            if isinstance(event, yaml.AliasEvent):
                raise TooMuch(self._key(), f"holds itself, through the alias *{event.anchor}", line)
            self.extents[id(node)] = self._extent(node)
        size, levels = self.extents[id(node)]
        self._check(size, len(self.path) + levels - 1, line)
        self.path.pop()
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        pairs = isinstance(node, yaml.MappingNode)
        parts = [self.extents[id(part)] for child in node.value for part in (child if pairs else (child,))]
        return 1 + sum(size for size, _ in parts), 1 + max((levels for _, levels in parts), default=0)

    def _check(self, size: int, levels: int, line: int) -> None:
        if size > MOST:
            raise TooMuch(self._key(), f"comes to more than {MOST:,} values, aliases counted as what they repeat", line)
        if levels > DEEPEST:
            raise TooMuch(self._key(), f"is nested more than {DEEPEST} levels deep", line)

    def _key(self) -> str:
        return ".".join(filter(None, self.path))


def compose(text: str | bytes) -> yaml.Node | None:
    """Returns the root of a YAML text; raises TooMuch if it exceeds a limit, yaml.YAMLError if it is not YAML."""
    return yaml.compose(text, Loader=BoundedLoader)
