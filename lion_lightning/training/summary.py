"""The two panels of a run: what is about to happen, and what came of it."""

from collections.abc import Mapping

from rich.console import Console
from rich.panel import Panel
from rich.table import Table


def show(console: Console, title: str, lines: Mapping[str, str]) -> None:
    """Print `lines` as a panel: names on the left, values wrapped on the right, at whatever width there is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(Panel(table, title=title, title_align="left", expand=False), highlight=False)


def model_card(title: str, lines: Mapping[str, str], library: str = "transformers") -> str:
    """A Hugging Face model card that says how the weights came about."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    head = f"---\nlibrary_name: {library}\n---\n\n# {title}\n\nTrained with lion_lightning.\n\n"
    return f"{head}| | |\n| --- | --- |\n{rows}\n"
