"""What the text of an optimised program says: its loops, communication, kernels, and the time that a TPU should take.

    step = m·k·attack step + rest          k steps of the attack's loop in each of m microbatches

A compiler for TPUs writes beside each kernel the cycles that it expects of it, by the cost model with which it chooses
tilings. Divided by the chip's clock they are the milliseconds of `estimate`: no measurement, and without communication
between chips. They show what is far from its bound, and which of two forms of a program is the faster one.
"""

import functools
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np


class Collective(NamedTuple):
    """All communication of one kind at one loop depth of the program."""

    kind: str
    depth: int  # number of loops around it, minus those around a step: −1 once per dispatch, 0 once per step
    count: int
    bytes: int  # of all results together, on one chip


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|branch_computations|true_computation|false_computation)=")
# computations inside one kernel: of a fusion, and the function of a reduction, sort or scatter, but not of a `call`
_INSIDE = re.compile(r" fusion\(.*calls=%?([\w.\-]+)| (?!call\()[\w\-]+\(.*to_apply=%?([\w.\-]+)")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
_PIECE = re.compile(r'chain_id="(\d+)"')  # the TPU compiler splits a collective into pieces between convolutions
_NO_FLOPS = re.compile(r'op_name="[^"]*(/gather|/scatter|/dynamic_slice|/dynamic_update_slice|searchsorted.*/while)"')
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


def collectives(program: str, around: int = 0) -> list[Collective]:
    """All communication in an optimised HLO module; `around` is the number of loops that enclose a train step."""
    found, sizes, chains = Counter(), Counter(), set()
    for line, depth in lines(program):
        if match := _COLLECTIVE.search(line):
            if piece := _PIECE.search(line):
                if piece[1] in chains:
                    continue
                chains.add(piece[1])
            found[match[2], depth - around] += 1
            sizes[match[2], depth - around] += _bytes(match[1])
    return [Collective(kind, level, count, sizes[kind, level]) for (kind, level), count in sorted(found.items())]


def loops(program: str) -> int:
    """The number of loops in an optimised HLO module, without those of gathers, scatters and searches: no FLOPs."""
    return sum(" while(" in line and not _NO_FLOPS.search(line) for line, _ in lines(program))


def lines(program: str, without: frozenset[str] | set[str] = frozenset()) -> list[tuple[str, int]]:
    """(line, number of loops around it) of all computations that the module's entry reaches, except `without`."""
    return [(line, len(around)) for line, around in _within_loops(program, without)]


def _within_loops(program, without=frozenset()):
    """As `lines`, with the names of the loops around a line, from the outermost."""
    blocks, entry, current = {}, None, None
    for line in program.splitlines():
        if match := _HEADER.match(line):
            current = match[2]
            blocks[current] = []
            entry = current if match[1] else entry
        elif current is not None:
            blocks[current].append(line)
    around, todo = {entry: ()}, [entry]
    while todo:
        name = todo.pop()
        for line in blocks.get(name, ()):
            called = _CALLED.search(line)
            inside = around[name] + ((line.split(" = ")[0].strip(),) if " while(" in line else ())
            for callee in re.findall(r"%([\w.\-]+)", line[called.start() :]) if called else ():
                known = callee in around and len(around[callee]) >= len(inside)
                if callee in blocks and callee not in without and not known:
                    around[callee] = inside
                    todo.append(callee)
    return [(line, loops) for name, loops in around.items() for line in blocks.get(name, ())]


def _bytes(shapes):
    total = 0
    for kind, dimensions in _SHAPE.findall(shapes):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind)[:2] or 32)
        total += bits // 8 * int(np.prod([int(d) for d in dimensions.split(",") if d], dtype=np.int64))
    return total


class Kernels(NamedTuple):
    """What an optimised module for a GPU launches, and the bytes that these kernels read and write."""

    in_loops: int  # the body of each loop counts once
    bytes_in_loops: int
    outside: int
    bytes_outside: int


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NO_KERNEL = frozenset(
    ("parameter", "tuple", "get-tuple-element", "constant", "bitcast", "while", "conditional", "call", "after-all")
)


def _inside(program):
    """The names of computations that are part of one kernel."""
    found = (_INSIDE.search(line) for line in program.splitlines())
    return {name for match in found if match for name in match.groups() if name}


def kernels(program: str, around: int = 0) -> Kernels:
    """The kernels of an optimised HLO module for a GPU; `around` enclosing loops do not count as loops."""
    types, found = {}, [0, 0, 0, 0]
    instructions = [(_INSTRUCTION.match(line), depth) for line, depth in lines(program, without=_inside(program))]
    for match, _ in instructions:
        if match:
            types[match[1]] = match[2]
    for match, depth in instructions:
        if match and match[3] not in _NO_KERNEL:
            operands = re.findall(r"%([\w.\-]+)", match[4].split(")")[0])
            place = 0 if depth > around else 2
            found[place] += 1
            found[place + 1] += _bytes(match[2]) + sum(_bytes(types.get(name, "")) for name in operands)
    return Kernels(*found)


# ---- the time that a TPU's compiler expects ------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel, and its bound: products over the chip's peak or bytes over its bandwidth, whichever takes longer."""

    operation: str  # of the traced program, which it comes from
    ms: float
    bound_ms: float
    in_attack: bool

    def slow(self) -> bool:
        """Whether it takes more than three times its bound; below 20 µs a kernel's launch counts, not its work."""
        return self.ms > max(3 * self.bound_ms, 0.02)


class Estimate(NamedTuple):
    """Expected milliseconds of one train step on one chip, and its kernels, the longest first."""

    attack_step_ms: float  # one step of the attack's loop; 0 without one
    rest_ms: float
    step_ms: float
    kernels: list[Kernel]
    unpriced: dict[str, int]  # how many kernels have no estimate, by kind: sorts, and factorisations as "Cholesky"


_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_UNPRICED = re.compile(r" (sort)\(| custom-call\(.*custom_call_target=\"(?!ConcatBitcast|AllocateBuffer)([^\"]*)\"")


def estimate(program: str, chip: Any, around: int = 0, attack_steps: int = 1, microbatches: int = 1) -> Estimate | None:
    """The expected time of an optimised module for a TPU; None where its compiler says nothing.

    Args:
      chip: has `clock` in Hz, `flops` and `bandwidth` per second.
      around: the number of loops that enclose a train step; what stands outside of them is left out.
      attack_steps: how often the attack's loop runs. Of the loops in a step it is the one that takes longest; the
        bodies of all others count once.
    """
    if chip.clock is None:
        return None
    bounds = _Bounds(program, chip)
    level = around + (microbatches > 1)
    totals, found = Counter(), []
    for line, inside in _within_loops(program):
        cycles = _CYCLES.search(line)
        if not cycles or len(inside) < around:
            continue
        ms, source = 1e3 * int(cycles[1]) / chip.clock, _SOURCE.search(line)
        totals[inside[: level + 1]] += ms
        found.append((ms, line, source[1] if source else "", inside[: level + 1]))
    deeper = [place for place in totals if len(place) > level]
    attack = max(deeper, key=totals.__getitem__) if deeper and attack_steps > 1 else None
    rest = sum(ms * (microbatches if len(place) >= level else 1) for place, ms in totals.items() if place != attack)
    each = totals[attack] if attack else 0.0
    found.sort(key=lambda item: -item[0])
    made = [Kernel(source, ms, bounds.ms(line), place == attack) for ms, line, source, place in found]
    return Estimate(each, rest, rest + microbatches * attack_steps * each, made, _unpriced(program, around))


def _unpriced(program, around):
    found = Counter()
    for line, depth in lines(program, without=_inside(program)):
        match = _UNPRICED.search(line)
        if match and depth >= around and not _CYCLES.search(line):
            found[match[1] or match[2]] += 1
    return dict(sorted(found.items()))


class _Bounds:
    """What the kernels of a module take at least, by the products and bytes that its text states."""

    def __init__(self, program, chip):
        self.chip, self.types, self.products, current = chip, {}, {}, None
        for line in program.splitlines():
            if match := _HEADER.match(line):
                current = self.products.setdefault(match[2], [])
            elif match := _INSTRUCTION.match(line):
                self.types[match[1]] = match[2]
                if current is not None and match[3] in ("convolution", "dot", "fusion"):
                    current.append(match)

    def ms(self, line):
        match = _INSTRUCTION.match(line)
        assert match is not None
        accessed = _bytes(match[2]) + sum(_bytes(self.types.get(name, "")) for name in _operands(match))
        return 1e3 * max(self._flops(match) / self.chip.flops, accessed / self.chip.bandwidth)

    def _flops(self, match):
        if match[3] == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", match[4])
            return sum(map(self._flops, self.products.get(called[1], ()))) if called else 0
        if match[3] not in ("convolution", "dot"):
            return 0
        _, out = _sizes(match[2])
        operands = [_sizes(self.types.get(name, "")) for name in _operands(match)]
        if len(operands) != 2 or any(not dims and match[3] == "convolution" for _, dims in operands):
            return 0
        passes = {"highest": 6, "high": 3}.get((re.search(r"operand_precision={(\w+)", match[4]) or ["", ""])[1], 1)
        passes = passes if operands[0][0] == "f32" else 1  # a float32 product in bfloat16 passes
        if match[3] == "dot":
            contracted = re.search(r"lhs_contracting_dims={([\d,]*)}", match[4])
            sizes = [operands[0][1][int(d)] for d in contracted[1].split(",") if d] if contracted else []
            return 2 * passes * int(np.prod(out, dtype=np.int64)) * int(np.prod(sizes, dtype=np.int64))
        return 2 * passes * _multiplications(match[4], out, *(dims for _, dims in operands))


def _operands(match):
    return re.findall(r"%([\w.\-]+)", match[4].split(")")[0])


def _sizes(shape):
    """(element type, sizes) of the first array in the text of a type."""
    found = _SHAPE.search(shape)
    return (found[1], [int(d) for d in found[2].split(",") if d]) if found else ("", [])


def _multiplications(text, out, lhs, rhs):
    """Those of a convolution, without those with padding or with the zeros of a dilation."""
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if names is None:
        return 0
    count = rhs[names[2].index("i")]
    for label in ("b", "f"):
        count *= out[names[3].index(label)]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window={([^}]*)}", text) or ["", ""])[1]))
    for axis, label in enumerate(sorted(set(names[3]) - {"b", "f"})):
        one = lambda key, default: window.get(key, "").split("x")[axis] if key in window else default  # noqa: B023, E731
        low = int(one("pad", "0_0").split("_")[0])
        steps = (int(one(key, "1")) for key in ("size", "stride", "lhs_dilate", "rhs_dilate"))
        count *= _met(out[names[3].index(label)], lhs[names[1].index(label)], low, *steps)
    return count


@functools.cache
def _met(out, size, low, window, stride, lhs_dilate, rhs_dilate):
    """How many pairs (output, entry of the window) along one axis meet an entry of the input of `size`."""
    place = np.arange(out)[:, None] * stride + np.arange(window)[None] * rhs_dilate - low
    return int(np.sum((place >= 0) & (place <= (size - 1) * lhs_dilate) & (place % lhs_dilate == 0)))
