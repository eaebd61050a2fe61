"""Collectives of a compiled program: in which loops they stand, what they carry, how often they run."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_INSTRUCTION = re.compile(rf"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({_KINDS})(?:-start)?\(")
_CALLED = re.compile(r"(\w+)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        name: The instruction, as a profile names it.
        kind: Such as "all-reduce".
        numbers: How many numbers each of its arrays has.
        bytes: Of all of its arrays.
        loops: The bodies of the loops that it stands in, the outermost first.
    """

    name: str
    kind: str
    numbers: tuple[int, ...]
    bytes: int
    loops: tuple[str, ...]


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, by its `as_text()`, once for each place they are called from."""
    blocks = {}
    for block in re.split(r"\n(?=%|ENTRY)", text):
        head = re.match(r"(ENTRY )?%?([\w.\-]+) ", block)
        if head:
            blocks["ENTRY" if head[1] else head[2]] = block.splitlines()[1:]

    def within(name: str, loops: tuple[str, ...]) -> Iterator[Collective]:
        for line in blocks[name]:
            if match := _INSTRUCTION.match(line):
                yield _collective(match, loops)
            for how, one, several in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", several) or [one]:
                    if called in blocks:
                        in_loop = how in ("body", "condition")
                        yield from within(called, (*loops, called) if in_loop else loops)

    return list(within("ENTRY", ()))


def _collective(match: re.Match[str], loops: tuple[str, ...]) -> Collective:
    name, shapes, kind = match.groups()
    numbers, size = [], 0
    for _, bits, dimensions in _SHAPE.findall(shapes):
        numbers.append(math.prod(int(n) for n in dimensions.split(",") if n))
        size += numbers[-1] * int(bits or 8) // 8  # `pred` names no bits.
    return Collective(name, kind, tuple(numbers), size, loops)


def executed(folder: Path, found: list[Collective]) -> Counter[str]:
    """How often each of the collectives `found` ran on this process's CPU devices, all together.

    Args:
        folder: What `jax.profiler.trace` was given; one profile.
        found: Those of the program that ran.
    """
    (path,) = folder.rglob("*.xplane.pb")
    names = {collective.name for collective in found}
    return Counter(
        event.name
        for plane in ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name in names
    )
