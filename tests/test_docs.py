"""What the documents promise: links lead somewhere, Python runs, commands compose, and the site builds strictly."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("recipes/*/README.md"),
    *ROOT.glob(".github/**/*.md"),
]
GUIDES = [ROOT / "docs/start.md", *(ROOT / "docs/how-to").glob("*.md")]
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(#[^)\s]*)?\)")


def prose(document: Path) -> str:
    """A document without its fenced code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    text = prose(document)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_to_a_file_and_to_a_heading(document: Path) -> None:
    missing = []
    for target, anchor in LINK.findall(prose(document)):
        place = (document.parent / target).resolve() if target else document
        if not place.exists() or (anchor and place.suffix == ".md" and anchor[1:] not in anchors(place)):
            missing.append(target + anchor)
    assert not missing


def test_documents_that_code_refers_to_exist() -> None:
    places = [
        file
        for folder in ("conf", "lion_lightning", "recipes", "scripts")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".yaml", ".sh")
    ]
    found = {
        (named(file), name)
        for file in places
        for name in re.findall(r"\bdocs/[\w/.-]+\.md\b", file.read_text(encoding="utf-8"))
    }
    assert len(found) > 5
    written = {"docs/guard/healthy.md"}  # an --output
    assert not [pair for pair in found if not (ROOT / pair[1]).exists() and pair[1] not in written]


def blocks(document: Path) -> list[str]:
    """Python written in the document itself; `{ .python }` marks a script of examples/, which has a test of its own."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", [guide for guide in GUIDES if blocks(guide)], ids=named)
def test_python_of_a_guide_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(document)), str(document), "exec"), {})


def commands(document: Path) -> Iterator[str]:
    """The arguments of each `train.py` in a guide that stands for a run."""
    text = document.read_text(encoding="utf-8")
    for line in re.findall(
        r"^(?:.*\s)?train\.py (.+)$", "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)), re.M
    ):
        yield line.split("#")[0]


@pytest.mark.parametrize("document", [guide for guide in GUIDES if list(commands(guide))], ids=named)
def test_commands_of_a_guide_compose(document: Path, compose: Callable[..., DictConfig]) -> None:
    for arguments in commands(document):
        words = [word for word in arguments.split() if "=" in word and not word.startswith(("hydra.", "hydra/", "-"))]
        assert compose(*(re.sub(r"(=[^,\[]+),.*", r"\1", word) for word in words)).recipe.name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs and mkdocstrings are not installed; `make docs` installs and runs them")
    answer = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
