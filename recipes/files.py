"""Files of data from outside, for every recipe: listed, accounted for, and identified for the cache."""

import codecs
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import charset_normalizer

from lion_lightning.errors import ConfigError, check_number

SAMPLE_BYTES = CHARACTERS_PER_READ = 2**20
NAMED = 5  # most files that an error names, besides the first, as not UTF-8 either
ICONV_NAMES = {  # where it is not Python's name in capitals with hyphens
    "latin_1": "LATIN1", "mac_roman": "MACINTOSH", "mac_latin2": "MAC-CENTRALEUROPE", "mac_iceland": "MAC-IS",
    "utf_16_be": "UTF-16BE", "utf_16_le": "UTF-16LE", "utf_32_be": "UTF-32BE", "utf_32_le": "UTF-32LE",
    "iso2022_jp": "ISO-2022-JP", "iso2022_jp_1": "ISO-2022-JP", "iso2022_jp_2": "ISO-2022-JP-2",
    "iso2022_jp_3": "ISO-2022-JP-3", "iso2022_jp_2004": "ISO-2022-JP-3", "iso2022_jp_ext": "ISO-2022-JP",
    "iso2022_kr": "ISO-2022-KR", "shift_jis_2004": "SHIFT_JISX0213", "shift_jisx0213": "SHIFT_JISX0213",
    "euc_jis_2004": "EUC-JISX0213", "kz1048": "RK1048", "ptcp154": "PT154",
}  # fmt: skip
NOT_IN_ICONV = ("cp720", "cp1006", "hz", "mac_greek", "mac_turkish")
BEYOND_ASCII = re.compile(r"\S*[^\x00-\x7f]\S*")  # a word with a character that is not ASCII
SHOWN_CHARACTERS = 300  # of another library's error message


def list_files(folder: Path) -> list[Path]:
    """Every file below `folder` in the order of their paths; links to files and folders are followed.

    A link to a folder that contains it is left out, since it would never end. A link without a target is listed.
    """
    return sorted(_walk(str(folder), (os.path.realpath(folder),)), key=str)


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield Path(entry.path)
            elif (target := os.path.realpath(entry.path)) not in above:
                yield from _walk(entry.path, (*above, target))


def folders_without(files: Iterable[Path], folder: Path) -> list[Path]:
    """Folders in `folder`, and in those below it, that have none of `files` anywhere in them; hidden ones are left out.

    Two levels are enough for splits and classes, and a folder in one that is told is not told again.
    """
    direct = {file.parent for file in files}
    holding = direct.union(*(place.parents for place in direct))
    return [place for place in _folders(folder) if place not in holding] + [
        inner for place in _folders(folder) if place in holding for inner in _folders(place) if inner not in holding
    ]


def _folders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether `file` or a folder between it and `folder` has a name that begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def account(on_disk: int, used: Mapping[str, int], unused: Mapping[str, Sequence[Path]], folder: Path) -> str:
    """One line that accounts for every file: those on disk are those used and those not used, each with a reason.

    Args:
        on_disk: all files.
        used: their number by what they are used for.
        unused: the files that are not used, by the reason.
        folder: paths are shown relative to it.

    Raises:
        RuntimeError: the numbers do not add up, which is an error of this library.
    """
    left = sum(map(len, unused.values()))
    if on_disk != sum(used.values()) + left:
        raise RuntimeError(f"{on_disk} files on disk, but {dict(used)} used and {left} not used")
    parts = [f"{count:,} {what}" for what, count in used.items()]
    parts += [
        f"{len(files):,} not used: {reason}, such as {os.path.relpath(files[0], folder)}"
        for reason, files in unused.items()
        if files
    ]
    return f"{on_disk:,} on disk" + " = " * bool(parts) + " + ".join(parts)


def fingerprint_of(files: Iterable[Path]) -> str:
    """The path of each file as listed, its target, size and modification time."""
    stats = ((file.absolute(), file.resolve(), file.stat()) for file in files)
    return " ".join(f"{file}>{target}:{stat.st_size}:{stat.st_mtime_ns}" for file, target, stat in stats)


def existing(path: str | Path, setting: str) -> Path:
    """The file or folder at `path`, which `setting` gave; ConfigError if there is none."""
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"{setting}={path}: there is no such file or folder")
    return place


def existing_file(path: str, setting: str, suffixes: Iterable[str]) -> Path:
    """The file at `path`.

    Args:
        path: given by the user.
        setting: the setting that gave it, for error messages.
        suffixes: endings that can be read, in lower case with the dot.

    Raises:
        ConfigError: there is no file, or it has another ending.
    """
    file = existing(path, setting)
    if not file.is_file() or not file.name.lower().endswith(tuple(suffixes)):
        raise ConfigError(f"{setting}={path} must be a file of {', '.join(suffixes)}")
    return file


def check_fraction(fraction: float) -> float:
    """`fraction`, if it is a possible `data.val_fraction`; else ConfigError."""
    check_number("data.val_fraction", fraction, "(0, 1)")
    return fraction


def pieces_of(file: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of up to a million characters, without a byte order mark."""
    with file.open(encoding="utf-8-sig") as text:
        while piece := text.read(CHARACTERS_PER_READ):
            yield piece


def is_utf8(file: Path) -> bool:
    """Whether a file is UTF-8; True where it cannot be read."""
    try:
        return all(pieces_of(file))
    except UnicodeDecodeError:
        return False
    except OSError:  # reported when the file itself is read
        return True


def not_utf8(file: Path, others: Sequence[Path] = ()) -> ConfigError:
    """The error that names the first byte of `file` that is not UTF-8, and which of the others are not UTF-8 either."""
    wrong = [os.path.relpath(other, file.parent) for other in others if not is_utf8(other)]
    more = f"; nor {'is' if len(wrong) == 1 else 'are'} {', '.join(wrong[:NAMED])}" if wrong else ""
    more += f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with file.open("rb") as raw:
        while True:
            piece = raw.read(CHARACTERS_PER_READ)
            begun = len(decoder.getstate()[0])  # bytes of a character that the last piece cut
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                place, byte = done - begun + error.start, error.object[error.start]
                return ConfigError(f"{file} is not UTF-8 (byte {place} is 0x{byte:02x}); {conversion_of(file)}{more}")
            if not piece:
                return ConfigError(f"{file} changed while it was read")
            done += len(piece)


def conversion_of(file: Path) -> str:
    """What to do with a file that is not UTF-8: the encodings that its beginning fits best, and how to convert it.

    Text of Western Europe fits several, of which the first is the usual one; how a word reads shows which one is right.
    """
    with file.open("rb") as raw:
        matches = charset_normalizer.from_bytes(raw.read(SAMPLE_BYTES))
    likely = [*(match for match in matches if match.encoding == "cp1252"), *matches]
    if not likely:
        return "it fits no encoding of text; is it a text file?"
    texts = {match.encoding: str(match) for match in (likely[0], matches[0])}
    words = zip(*(BEYOND_ASCII.findall(text) for text in texts.values()), strict=False)
    differ = next((reads for reads in words if len(set(reads)) == len(texts)), None)
    name = likely[0].encoding
    looks = f"it looks like {name}"
    if differ:
        looks = "it looks like " + " or ".join(f"{one} ({word[:20]})" for one, word in zip(texts, differ, strict=True))
    if name in NOT_IN_ICONV:
        return f"{looks}; convert it to UTF-8"
    known = ICONV_NAMES.get(name, name.upper().replace("_", "-"))
    return f"{looks}; convert it: iconv -f {known} -t UTF-8 {shlex.quote(file.name)} > converted{file.suffix}"


def without_surrogates(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones, which no encoding can hold, replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, shortened."""
    return " ".join(str(error).split())[:SHOWN_CHARACTERS]
