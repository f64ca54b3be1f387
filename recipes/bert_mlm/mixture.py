"""Several text sources with weights, which are shares of the training tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lion_lightning.errors import ConfigError
from recipes.bert_mlm.corpus import Corpus, TextFiles
from recipes.bert_mlm.hub import HubText

SETTING = "data.sources"
PLACES = ("path", "hub", "corpus")


@dataclass(frozen=True)
class Source:
    """A text source and its weight among others.

    Attributes:
        label: what it is called in the summary.
        corpus: its documents.
        weight: its share of the training tokens, relative to the other sources.
    """

    label: str
    corpus: Corpus
    weight: float


@dataclass(frozen=True)
class Mixture:
    """Text sources that share the training stream by weights.

    A source that is smaller than its share is repeated more often. Validation holds the held-out documents of all.
    """

    sources: tuple[Source, ...]


def mixture_of(sources: Sequence[Mapping[str, Any]] | None) -> Mixture:
    """The mixture that the setting `data.sources` describes.

    Args:
        sources: of each, `weight` (1 if left out) and where it is: `path` as for data=text_files, `hub` with the
            arguments of data=hub_text, or `corpus`.

    Raises:
        ConfigError: none, or one without a place or with a weight that is not above 0.
    """
    if not sources:
        raise ConfigError(
            f"data=mixture needs {SETTING}=, such as '[{{path: books, weight: 3}}, {{path: letters, weight: 1}}]'"
        )
    return Mixture(tuple(_source(dict(source)) for source in sources))


def check_weight(source: Mapping[str, Any]) -> float:
    """The weight of `source`; ConfigError if it is none."""
    weight = source.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ConfigError(f"{SETTING}: weight must be a number above 0, got {weight!r}")
    return float(weight)


def place_of(source: Any) -> str:
    """Which of `path`, `hub` and `corpus` says where `source` is.

    Raises:
        ConfigError: none of them, or several.
    """
    given = [place for place in PLACES if place in source] if isinstance(source, Mapping) else []
    if len(given) != 1:
        raise ConfigError(f"{SETTING}: each source needs one of {', '.join(PLACES)}, got {source!r}")
    return given[0]


def _source(source: dict[str, Any]) -> Source:
    place, weight = place_of(source), check_weight(source)
    where = source.pop(place)
    source.pop("weight", None)
    try:
        if place == "hub":
            return Source(str(where), HubText(where, **source), weight)
        if source:
            raise TypeError(f"{', '.join(source)} means nothing for a source with {place}")
    except TypeError as error:
        raise ConfigError(f"{SETTING}: {error}") from error
    if place == "path":
        return Source(str(where), TextFiles(where), weight)
    return Source(type(where).__name__, where, weight)
