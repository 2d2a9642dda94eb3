"""A table with a sentence over it: printed in a terminal, and shown in a notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group


class Table:
    """What has a headline, columns, and cells for each row; the columns in `_numbers` are set to the right."""

    _columns: tuple[str, ...] = ()
    _numbers: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The table in one sentence."""
        raise NotImplementedError

    def _cells(self) -> Iterable[tuple[str, ...]]:
        raise NotImplementedError

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bright_black")
        for name in self._columns:
            table.add_column(name, justify="right" if name in self._numbers else "left", no_wrap=True)
        for cells in self._cells():
            table.add_row(*map(Text, cells))  # names are text, never markup
        return Group(Text(self.headline, style="bold"), table)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # pyright: ignore[reportAttributeAccessIssue]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in self._columns)
        body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in self._cells())
        rows = "".join(f"<tr>{row}</tr>" for row in body)
        return f"<p>{html.escape(self.headline)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
