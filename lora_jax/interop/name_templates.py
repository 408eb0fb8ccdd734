"""Names with placeholders, such as "layers.{i}.query", which stands for the names of all layers.

A `{word}` stands for a number, and `{k|v}` for one of these words. Braces themselves are written twice, `{{` and `}}`;
single ones with anything else between them stand for themselves.
"""

import re
from collections.abc import Mapping, Sequence

_TOKEN = re.compile(r"{{|}}|{(\w+(?:\|\w+)*)}")


def literal(text: str) -> str:
    """Return the template that stands for just this name, whatever characters it has.

    >>> literal("a.{i}")
    'a.{{i}}'
    """
    return text.replace("{", "{{").replace("}", "}}")


def split(template: str) -> list[str]:
    """Return the parts of a template: text, the word of a placeholder, text, and so on.

    >>> split("layers.{i}.query"), split("a.{{i}}")
    (['layers.', 'i', '.query'], ['a.{i}'])
    """
    parts, at = [""], 0
    for token in _TOKEN.finditer(template):
        parts[-1] += template[at : token.start()]
        at = token.end()
        if token[1] is None:
            parts[-1] += token[0][0]
        else:
            parts += [token[1], ""]
    parts[-1] += template[at:]
    return parts


def placeholders(template: str) -> list[str]:
    """Return the words of the placeholders, in order."""
    return split(template)[1::2]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the name with these values in the places of the placeholders.

    >>> fill("layers.{i}.query", {"i": "7"})
    'layers.7.query'
    """
    return "".join(values[part] if i % 2 else part for i, part in enumerate(split(template)))


def choose(word: str, number: int) -> str:
    """Return what a placeholder is at an index: the number, or that one of its words.

    >>> choose("i", 1), choose("k|v", 1)
    ('1', 'v')
    """
    return word.split("|")[number] if "|" in word else str(number)


class NameTable:
    """Templates, of which the first one that a name fits is found without a look at all the others.

    Args:
        templates: the first one that fits counts.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self._names: dict[str, int] = {}
        self._patterns: dict[str, list[tuple[int, re.Pattern[str], list[str]]]] = {}
        for order, template in enumerate(templates):
            parts = split(template)
            if len(parts) == 1:
                self._names.setdefault(parts[0], order)
            else:
                pattern = "".join(r"(\d+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
                entry = order, re.compile(pattern), parts[1::2]
                self._patterns.setdefault(_outline("0".join(parts[::2])), []).append(entry)

    def first(self, name: str) -> tuple[int, dict[str, str]] | None:
        """Return the position of the first template that a name fits, and the numbers that it has."""
        known = self._names.get(name)
        for order, pattern, words in self._patterns.get(_outline(name), []):
            if known is not None and known < order:
                break
            if (found := pattern.fullmatch(name)) is not None:
                return order, dict(zip(words, found.groups(), strict=True))
        return None if known is None else (known, {})


def _outline(name: str) -> str:
    """Return a name with one 0 for each of its numbers: whatever fits a template has the outline of the template."""
    return re.sub(r"\d+", "0", name)
