"""Tables with a sentence over them: printed in a terminal, and shown in a notebook, as text whatever is in them."""

from __future__ import annotations

import html
import io
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group


class Table:
    """What has a headline, columns, and cells for each row; the columns in `_numbers` are set to the right."""

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
    """Return a sentence and a table in HTML. All of it is escaped: what is passed is text.

    It has no colors of its own, so it looks right on any ground, light or dark.

    Args:
        headline: the sentence; a new line in it is kept. Empty: none.
        columns: their names; none, where the sentence is all.
        rows: the cells of each.
        numbers: the columns that are set to the right.

    Example:
        >>> to_html("One layer", ["layer"], [["<b>"]])[:52]
        '<p style="white-space:pre-line">One layer</p><table>'
    """
    # Notebooks set all cells to the right, and give every table their own colors.
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
