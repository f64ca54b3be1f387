"""Tables on disk: their columns, and one clear message for each that cannot be read."""

from pathlib import Path

from lion_lightning.recipes.tables import Columns, Row, columns_of, read_table


def test_a_key_that_the_first_line_lacks_is_a_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"label": "x", "text": "b"}\n')
    assert list(columns_of(file)) == ["text", "label"]
    assert list(read_table(file, Columns("text", "label"))) == [Row("a", None, None, 1), Row("b", None, "x", 2)]
