"""Tables with a headline, for the terminal and for notebooks. Cells are shown as plain text, whatever they hold."""

from __future__ import annotations

import html
import io
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group


class Table:
    """Base class of tables: a headline, columns, and the cells of each row. Columns in `_numbers` are right-aligned."""

    _columns: tuple[str, ...] = ()
    _numbers: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The table in one sentence; empty where it needs none."""
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
        return Group(*([Text(self.headline, style="bold")] if self.headline else []), table)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # pyright: ignore[reportAttributeAccessIssue]

    def _repr_html_(self) -> str:
        return to_html(self.headline, self._columns, self._cells(), self._numbers)


def to_html(headline: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()) -> str:
    """Return a sentence and a table in HTML. Whatever is passed is text, and is escaped.

    It sets no colors, so it fits a light and a dark background.

    Args:
        headline: the sentence; line breaks in it are kept. Empty for none.
        columns: their names; empty for a sentence without a table.
        rows: the cells of each.
        numbers: the columns that are right-aligned.

    Example:
        >>> to_html("One layer", ["layer"], [["<b>"]])[:52]
        '<p style="white-space:pre-line">One layer</p><table>'
    """
    # Notebooks right-align all cells, and give every table their own colors.
    styles = [f"text-align:{'right' if name in numbers else 'left'};white-space:pre-wrap" for name in columns]

    def row(tag: str, cells: Sequence[str]) -> str:
        made = (
            f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for style, cell in zip(styles, cells, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    said = f'<p style="white-space:pre-line">{html.escape(headline)}</p>' if headline else ""
    if not columns:
        return said
    head, body = row("th", columns), "".join(row("td", cells) for cells in rows)
    return f"{said}<table><thead>{head}</thead><tbody>{body}</tbody></table>"
