"""Draw rooms on floors, as an SVG: a room stands above all that it imports.

The lowest room is the ground on which all others stand, and the highest the roof; no lines are drawn to these two. For
every other room one line, in its colour, leads down to it from all rooms that import it. A floor that a line passes has
a lane for it. The order of rooms and lanes from left to right is the one with the shortest lines and the fewest
crossings that a local search finds.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

MONO, SANS = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace", "'DejaVu Sans', Verdana, Arial, sans-serif"
CHARACTER, WORD = 7.3, 7.0  # widths of a character of 12 px, at least: monospaced, and otherwise
LINE, HEAD, PAD = 17, 24, 14
MARGIN, APART, LANE = 30, 34, 16  # around all; between boxes; between lanes
TRACK, SPACE = 11, 18  # between horizontal lines; above and below these
WIDEST = 900  # all boxes of a floor together
GREY = ("#f6f6f6", "#777777")  # of what no line leads to
COLOURS = (  # of a box, and of its frame and lines
    ("#e3f0fb", "#3d7ebf"),
    ("#e6f5e8", "#44965a"),
    ("#fdf0dc", "#c98a1b"),
    ("#f1e8fa", "#8658b8"),
    ("#fde7e7", "#cf5c5c"),
    ("#e0f5f3", "#2a968e"),
    ("#fbe8f3", "#bb5793"),
    ("#eef1d9", "#7d8a2e"),
    ("#e8eafc", "#5e68c9"),
    ("#f7ebe1", "#a5714a"),
)
Item = tuple[str, str]  # ("box", title), or ("lane", the title of the box that it leads to)
Net = tuple[str, list[float], float]  # which box it leads to, from where above it, and to where below
Nets = Mapping[int, Sequence[Net]]  # in the space below each floor


@dataclass
class Box:
    """A room: its title, what it is, its files with their numbers of lines, and the titles that it imports."""

    title: str
    about: str
    files: Sequence[tuple[str, int]]
    imports: Sequence[str]
    columns: int = 1
    x: float = 0  # of its centre
    bottom: float = 0
    width: float = field(default=0, init=False)
    height: float = field(default=0, init=False)

    def fit(self, columns: int, width: float = 0) -> None:
        """Find the size for so many columns of files."""
        self.columns = min(columns, len(self.files))
        least = max(CHARACTER * 1.3 * len(self.title) + 11 * len(self.total()) * 0.62 + 16, 150)
        inner = max(width - 2 * PAD, least, self.columns * self.column() + (self.columns - 1) * 22)
        self.width = inner + 2 * PAD
        rows = -(-len(self.files) // self.columns)
        self.height = 2 * PAD + HEAD - 6 + LINE * (len(self.words()) + rows) + 4

    def column(self) -> float:
        return CHARACTER * (max(len(name) for name, _ in self.files) + 6)

    def total(self) -> str:
        return f"{sum(lines for _, lines in self.files):,} lines"

    def words(self) -> list[str]:
        """Return what the room is, in lines of its width."""
        lines = [""]
        for word in self.about.split():
            if lines[-1] and WORD * len(f"{lines[-1]} {word}") > self.width - 2 * PAD:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        return lines

    def draw(self, fill: str, line: str) -> Iterator[str]:
        left, top = self.x - self.width / 2, self.bottom - self.height
        yield _rect(left, top, self.width, self.height, fill, line)
        y = top + PAD + 11
        yield _text(left + PAD, y, self.title, 15, MONO, weight="bold")
        yield _text(left + self.width - PAD, y, self.total(), 11, SANS, anchor="end", fill="#666")
        y += HEAD - 6
        for words in self.words():
            yield _text(left + PAD, y, words, 12, SANS, fill="#444")
            y += LINE
        y += 4
        rows = -(-len(self.files) // self.columns)
        step = (self.width - 2 * PAD + 22) / self.columns
        for i, (name, lines) in enumerate(self.files):
            x, at = left + PAD + step * (i // rows), y + LINE * (i % rows)
            yield _text(x, at, name, 12, MONO)
            yield _text(x + step - 22, at, str(lines), 12, MONO, anchor="end", fill="#888")


class FloorPlan:
    """Which floor each box is on, and from left to right which boxes and lanes each floor has.

    A lane is called by the title of the box that it leads to. Each box has one place in the order from left to right,
    and each lane too, the same on all floors.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = {box.title: box for box in boxes}
        self.floor: dict[str, int] = {}
        for box in boxes:  # which come from the lowest to the highest
            self.floor[box.title] = 1 + max((self.floor[title] for title in box.imports), default=0)
        self.users = {t: [b.title for b in boxes if t in b.imports] for t in self.boxes}
        self.top = max(self.floor.values())
        highest = {t: max((self.floor[u] for u in users), default=0) for t, users in self.users.items()}
        # The items of each floor: ("box", title) and ("lane", title).
        self.items = {
            n: [("box", t) for t in self.boxes if self.floor[t] == n]
            + [("lane", t) for t in self.boxes if self.floor[t] < n < highest[t]]
            for n in range(1, self.top + 1)
        }
        for items in self.items.values():
            _fit([self.boxes[title] for kind, title in items if kind == "box"])
        self.order = list(dict.fromkeys(item for items in self.items.values() for item in items))
        self.x = self._place(self.order)

    def arrange(self) -> None:
        """Move single items to other places, while that makes lines shorter."""
        best, moved = self._cost(self.x), True
        while moved:
            moved = False
            for item in list(self.order):
                for i in range(len(self.order)):
                    order = [other for other in self.order if other != item]
                    order.insert(i, item)
                    x = self._place(order)
                    if (cost := self._cost(x)) < best - 1e-6:
                        best, self.order, self.x, moved = cost, order, x, True

    def lanes(self, n: int) -> list[str]:
        """Return the boxes that a lane of this floor leads to."""
        return [title for kind, title in self.items[n] if kind == "lane"]

    def width(self, item: Item) -> float:
        return self.boxes[item[1]].width if item[0] == "box" else 0.0

    def _place(self, order: Sequence[Item]) -> dict[Item, float]:
        """Return the centre of each item: as near to what it is joined with as its neighbours allow."""
        left: dict[Item, list[tuple[Item, float]]] = {item: [] for item in order}
        right: dict[Item, list[tuple[Item, float]]] = {item: [] for item in order}
        for items in self.items.values():
            for a, b in itertools.pairwise(sorted(items, key=order.index)):
                both = {a[0], b[0]}
                space = APART if both == {"box"} else LANE if both == {"lane"} else LANE + 4
                apart = (self.width(a) + self.width(b)) / 2 + space
                right[a].append((b, apart))
                left[b].append((a, apart))
        x: dict[Item, float] = {}
        for item in order:
            x[item] = max((x[other] + apart for other, apart in left[item]), default=0.0)
        for round in range(24):
            for item in order if round % 2 else reversed(order):
                low = max((x[other] + apart for other, apart in left[item]), default=-1e9)
                high = min((x[other] - apart for other, apart in right[item]), default=1e9)
                x[item] = min(max(self._wanted(item, x), low), high)
        return x

    def _wanted(self, item: Item, x: Mapping[Item, float]) -> float:
        kind, title = item
        near = []
        if kind == "lane":
            near = [x["box", title], x["box", title], *(x["box", user] for user in self.users[title])]
        else:
            near = [x[self._below(title, other)] for other in self.boxes[title].imports]
            near += [x["lane", title]] if ("lane", title) in x else [x["box", user] for user in self.users[title]]
        return math.fsum(near) / len(near) if near else x[item]

    def _below(self, title: str, imported: str) -> Item:
        """Return what a box is joined with on the floor below it, for a box that it imports."""
        return ("box" if self.floor[imported] == self.floor[title] - 1 else "lane"), imported

    def nets(self, x: Mapping[Item, float]) -> dict[int, list[Net]]:
        """Return the parts of lines in each space between floors."""
        ports = self._ports(x)
        found: dict[int, list[Net]] = {}
        for n in range(2, self.top + 1):
            found[n] = []
            for title in self.boxes:
                above = [ports[user, title] for user in self.users[title] if self.floor[user] == n]
                if ("lane", title) in self.items[n]:
                    above.append(x["lane", title])
                if above:
                    below = self._entry(title, x) if self.floor[title] == n - 1 else x["lane", title]
                    found[n].append((title, above, below))
        return found

    def _entry(self, title: str, x: Mapping[Item, float]) -> float:
        """Return where the line enters a box from above: straight below the lane, if it can be."""
        return self._within(title, x.get(("lane", title), x["box", title]), x)

    def _within(self, title: str, wanted: float, x: Mapping[Item, float], side: float = 18) -> float:
        half = self.boxes[title].width / 2 - side
        return min(max(wanted, x["box", title] - half), x["box", title] + half)

    def _ports(self, x: Mapping[Item, float]) -> dict[tuple[str, str], float]:
        """Return where each box is left by the line to each of its imports, as far apart as lanes are."""
        ports: dict[tuple[str, str], float] = {}
        for title, box in self.boxes.items():
            wanted = {}
            for other in box.imports:
                kind, _ = self._below(title, other)
                to = self._entry(other, x) if kind == "box" else x["lane", other]
                wanted[other] = self._within(title, to, x)
            names = sorted(wanted, key=lambda other: (wanted[other], x[self._below(title, other)], other))
            at = [wanted[other] for other in names]
            for i in range(1, len(at)):
                at[i] = max(at[i], at[i - 1] + LANE)
            limit = x["box", title] + box.width / 2 - 12
            for i in reversed(range(len(at))):
                at[i] = min(at[i], limit - LANE * (len(at) - 1 - i))
            ports |= {(title, other): place for other, place in zip(names, at, strict=True)}
        return ports

    def _cost(self, x: Mapping[Item, float]) -> float:
        """Return the length of all horizontal lines, so much more for each crossing, and the width."""
        length, crossings = 0.0, 0
        for nets in self.nets(x).values():
            for _, above, below in nets:
                length += max(*above, below) - min(*above, below)
            tracks = _tracks(nets)
            for (t, a, b), (u, c, d) in itertools.permutations(nets, 2):
                low, high = min(*a, b), max(*a, b)
                if high > low:
                    crossings += sum(low < p < high and tracks[t] > tracks[u] for p in [d])
                    crossings += sum(low < p < high and tracks[t] < tracks[u] for p in c)
        edges = [(x[i] - self.width(i) / 2, x[i] + self.width(i) / 2) for i in x]
        return length + 120 * crossings + 3 * (max(e[1] for e in edges) - min(e[0] for e in edges))


def _fit(boxes: Sequence[Box]) -> None:
    """Give the boxes of a floor as many columns as there is room for, the tallest first, and one height."""
    for box in boxes:
        box.fit(1)
    while True:
        tallest = max(boxes, key=lambda box: box.height)
        columns, height = tallest.columns, tallest.height
        tallest.fit(columns + 1)
        wide = math.fsum(box.width for box in boxes) + APART * (len(boxes) - 1)
        if tallest.height >= height or wide > (WIDEST if len(boxes) > 1 else 0.75 * WIDEST):
            tallest.fit(columns)
            break
    for box in boxes:
        box.height = max(box.height for box in boxes)


def _tracks(nets: Sequence[Net]) -> dict[str, int]:
    """Return the height of each net's horizontal line, counted from the top: what leads far lies low."""
    bent = [(max(*a, b) - min(*a, b), title) for title, a, b in nets]
    return {title: i for i, (_, title) in enumerate(sorted(bent))}


def draw(ground: Box, boxes: Sequence[Box], roof: Box, note: str) -> str:
    """Return the SVG."""
    plan = FloorPlan(boxes)
    plan.arrange()
    left = min(x - plan.width(item) / 2 for item, x in plan.x.items()) - MARGIN
    width = max(x + plan.width(item) / 2 for item, x in plan.x.items()) - left + MARGIN
    x = {item: at - left for item, at in plan.x.items()}
    for slab in (ground, roof):
        slab.fit(int((width - 2 * MARGIN) // (slab.column() + 26)), width - 2 * MARGIN)
        slab.x = width / 2

    nets = plan.nets(x)
    roof.bottom = y = MARGIN + roof.height
    y += 2 * SPACE
    for n in range(plan.top, 0, -1):
        on_floor = [box for title, box in plan.boxes.items() if plan.floor[title] == n]
        y += on_floor[0].height
        for box in on_floor:
            box.x, box.bottom = x["box", box.title], y
        y += 2 * SPACE + TRACK * max(len(nets.get(n, [])) - 1, 0)
    ground.bottom = y + ground.height

    imported = [title for title in plan.boxes if plan.users[title]]
    colours = dict.fromkeys(plan.boxes, GREY) | dict(zip(imported, COLOURS, strict=False))
    height = ground.bottom + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        _text(MARGIN, roof.bottom + 1.2 * SPACE, note, 12, SANS, fill="#666"),
    ]
    for title in imported:
        out += _line(plan, title, nets, colours[title][1])
    for title, box in plan.boxes.items():
        out += box.draw(*colours[title])
    out += [*ground.draw(*GREY), *roof.draw(*GREY)]
    for title in imported:
        out += _ends(plan, title, nets, colours[title][1])
    return "\n".join([*out, "</svg>", ""])


def _heights(plan: FloorPlan, n: int) -> tuple[float, float]:
    """Return the top and the bottom of a floor."""
    box = next(box for title, box in plan.boxes.items() if plan.floor[title] == n)
    return box.bottom - box.height, box.bottom


def _line(plan: FloorPlan, title: str, nets: Nets, colour: str) -> Iterator[str]:
    """Draw all that leads down to one box."""
    for n in range(2, plan.top + 1):
        for name, above, below in nets[n]:
            if name == title:
                (_, top), (end, on) = _heights(plan, n), _heights(plan, n - 1)
                turn = top + SPACE + TRACK * _tracks(nets[n])[title]
                for start in above:
                    yield _path(f"M{start:.1f} {top:.1f}V{turn:.1f}H{below:.1f}V{end:.1f}", colour)
                if plan.floor[title] < n - 1:
                    yield _path(f"M{below:.1f} {end:.1f}V{on:.1f}", colour)


def _ends(plan: FloorPlan, title: str, nets: Nets, colour: str) -> Iterator[str]:
    """Draw the arrow of a line, and dots where it begins and where parts of it meet."""
    for n in range(2, plan.top + 1):
        for name, above, below in nets[n]:
            if name == title:
                (_, top), (end, _) = _heights(plan, n), _heights(plan, n - 1)
                turn = top + SPACE + TRACK * _tracks(nets[n])[title]
                passing = title in plan.lanes(n)
                for start in above[:-1] if passing else above:
                    yield _dot(start, top, colour)
                if len(above) > 1:
                    for x in sorted({*above, below})[1:-1] if below not in (min(above), max(above)) else [below]:
                        yield _dot(x, turn, colour)
                if plan.floor[title] == n - 1:
                    yield f'<path d="M{below - 5:.1f} {end - 9:.1f}h10l-5 9z" fill="{colour}"/>'


def _path(d: str, colour: str) -> str:
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'


def _rect(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8" fill="{fill}" '
        f'stroke="{line}" stroke-width="1.5"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    size: int,
    family: str,
    anchor: str = "start",
    weight: str = "normal",
    fill: str = "#222",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-family="{family}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )
