"""What is said of files from outside that cannot be read as they are."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from charset_normalizer.constant import IANA_SUPPORTED

from lion_lightning.recipes.files import ICONV_NAMES, NOT_IN_ICONV, conversion_of

needs_iconv = pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
TEXT = "Où est le café ? Très bien, à côté de l'hôtel. L'été dernier, la forêt brûlait. " * 200


@needs_iconv
@pytest.mark.parametrize("encoding", ["cp1252", "latin_1", "utf_16", "utf_16_le", "utf_32", "utf_32_be"])
def test_the_command_that_is_advised_converts_the_file(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "un livre (1).txt"
    file.write_bytes(TEXT.encode(encoding))
    advice = conversion_of(file)
    command = advice.partition("convert it: ")[2]
    assert command, advice
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "converted.txt").read_text(encoding="utf-8") == TEXT


def test_the_usual_encoding_comes_first_and_a_word_shows_which_is_right(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(("Les élèves étaient déjà là où ils ont reçu des gâteaux. " * 20).encode("cp1252"))
    assert conversion_of(file).startswith(
        "it looks like cp1252 (élèves) or cp1257 (élčves); convert it: iconv -f CP1252"
    )


@needs_iconv
@pytest.mark.skipif(sys.platform != "linux", reason="the names are those of glibc")
def test_iconv_knows_the_names_that_are_advised() -> None:
    names = {name: ICONV_NAMES.get(name, name.upper().replace("_", "-")) for name in IANA_SUPPORTED}
    unknown = [
        name for name, advised in names.items() if subprocess.run(["iconv", "-f", advised], input=b"").returncode
    ]
    assert sorted(unknown) == sorted(NOT_IN_ICONV)
