"""The rooms of the package and the arrows between them, counted and drawn from the imports.

python tools/rooms.py                 the picture, and the counts
python tools/rooms.py --write         the same into docs/architecture.md; --check: is it there?
python tools/rooms.py --root FOLDER   another checkout, such as an older one
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- rooms -->\n", "<!-- end of rooms -->\n"
Arrows = dict[str, set[str]]


def read_arrows(root: Path) -> Arrows:
    """Each room (a package or a loose module of diffitm) and the rooms that it imports."""
    sys.path.insert(0, str(root))
    graph = grimp.build_graph("diffitm", cache_dir=None)
    rooms = sorted(graph.find_children("diffitm"))
    return {
        room.removeprefix("diffitm."): {
            other.removeprefix("diffitm.")
            for other in rooms
            if other != room
            and graph.direct_import_exists(importer=room, imported=other, as_packages=True)
        }
        for room in rooms
    }


def read_floors(root: Path) -> list[list[str]]:
    """The floors that pyproject.toml's contract of imports states, highest first."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    layers: list[str] = next((c["layers"] for c in contracts if c["type"] == "layers"), [])
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def reachable(arrows: Arrows, room: str) -> set[str]:
    found, new = set[str](), {room}
    while new:
        new = {other for one in new for other in arrows[one]} - found
        found |= new
    return found


def count(arrows: Arrows, floors: list[list[str]]) -> str:
    """Rooms, arrows, arrows upward or between rooms of a floor, and rooms in circles."""
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    pairs = [(room, other) for room, others in arrows.items() for other in others]
    words = f"{len(arrows)} rooms, {len(pairs)} arrows"
    if floor:
        upward = [f"{a} -> {b}" for a, b in pairs if floor[a] >= floor[b]]
        words += f", {len(upward)} upward" + (f" ({', '.join(upward)})" if upward else "")
    circles = sorted(room for room in arrows if room in reachable(arrows, room))
    return f"{words}, {len(circles)} rooms in circles" + (
        f" ({', '.join(circles)})" * bool(circles)
    )


def draw(root: Path, arrows: Arrows, floors: list[list[str]]) -> str:
    """A line a room, floor by floor: what it is, in its own docstring's words, and what it imports."""
    order = [room for rooms in floors for room in rooms]
    lines = []
    for rooms in floors:
        for room in rooms:
            below = " ".join(other for other in order if other in arrows[room])
            lines += [f"{room:<12} {line}" for line in wrap(purpose(root, room))[:1]]
            lines += [f"{'':<12} {line}" for line in wrap(purpose(root, room))[1:]]
            lines += [f"{'':<12}   -> {below}"] * bool(below)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def purpose(root: Path, room: str) -> str:
    """The first sentences of a room's docstring."""
    place = root / "diffitm" / room
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return (
        (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    )


def wrap(text: str, width: int = 90) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def block(parts: Iterable[str]) -> str:
    return START + "\n" + "".join(f"    {line}".rstrip() + "\n" for line in parts) + "\n" + END


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    arrows, floors = read_arrows(given.root), read_floors(given.root)
    words, picture = count(arrows, floors), draw(given.root, arrows, floors)
    if not (given.write or given.check):
        print(f"{picture}\n{words}" if floors else words)
        return
    text = PAGE.read_text()
    head, rest = text.split(START)
    page = head + block([*picture.splitlines(), "", words]) + rest.split(END)[1]
    if given.write:
        PAGE.write_text(page)
    elif page != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} has another picture: run `make rooms`")


if __name__ == "__main__":
    main()
