"""Results for each weight: a mapping from paths, whose text is a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class ByPath(Mapping[str, T], Generic[T]):
    """`{path: what there is to say of this weight}`."""

    weights: dict[str, T]

    def __getitem__(self, path: str) -> T:
        return self.weights[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
