"""A lint for one kind of race in compiled kernels, which neither the interpreter nor a register count can see.

On sm90 a product (wgmma) reads its operands from shared memory while the program goes on. Triton's pipeliner lets one
of them be in flight when the next rows are fetched, and gives the operands as many buffers as that takes; but not a
loaded value that is also used by something else than the product (triton issue 6691). Then the rows that are fetched
ahead overwrite what is still being read. In Triton's own representation (TTGIR), a loop over steps i:

    P copies into a buffer before the loop, so that step i fetches for step i + P, into buffer (i + P) mod B of B
    an asynchronous warp_group_dot, which reads buffer i mod B
    a wait that lets F products be in flight

Products i, i - 1, .. i - F + 1 may still read when step i fetches: right where B >= P + F, and one more where the copy
stands before the product.
"""

import math
import re
from dataclasses import dataclass

VIEWS = ("memdesc_index", "memdesc_trans", "memdesc_reshape", "memdesc_reinterpret", "memdesc_subslice")
ALLOCATION = r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<([\dx]+)x\w+,"
COPIES = ("async_copy_global_to_local", "async_tma_copy_global_to_local", "local_store")


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """before: the lines above a loop that its names are seen from, so without other loops' bodies, where the same names
    stand for other values. body: its own lines, without those of loops inside it.
    """

    before: list[str]
    body: list[str]

    def definitions(self) -> dict[str, str]:
        """Value -> the operation that makes it."""
        pattern = re.compile(r"\s*(%[\w#]+)(?::\d+)? = (.*)")
        return {found[1]: found[2] for line in (*self.before, *self.body) if (found := pattern.match(line))}


def races(ttgir: str) -> list[str]:
    """The buffers of a kernel that are overwritten while a product may still read them."""
    lines = [re.sub(r" loc\(.*$", "", line) for line in ttgir.splitlines()]
    return sorted({buffer for loop in _loops(lines) for buffer in _races_of(loop)})


def _loops(lines: list[str]) -> list[_Loop]:
    """A loop ends where a brace closes at its own depth."""
    spans = []
    for start, line in enumerate(lines):
        if re.search(r"\bscf\.(for|while)\b", line):
            depth = len(line) - len(line.lstrip())
            closing = (i for i in range(start + 1, len(lines)) if re.match(rf" {{{depth}}}}}", lines[i]))
            spans.append((start, next(closing, len(lines))))
    loops = []
    for start, stop in spans:
        above = [(a, b) for a, b in spans if b < start]
        inside = [(a, b) for a, b in spans if start < a and b < stop]
        loops.append(
            _Loop(
                before=[lines[i] for i in range(start) if not any(a < i <= b for a, b in above)],
                body=[lines[i] for i in range(start + 1, stop) if not any(a <= i <= b for a, b in inside)],
            )
        )
    return loops


def _races_of(loop: _Loop) -> list[str]:
    waits = [int(n) for line in loop.body for n in re.findall(r"warp_group_dot_wait.*pendings = (\d+)", line)]
    products = [i for i, line in enumerate(loop.body) if "warp_group_dot " in line and "isAsync = true" in line]
    if not products or not waits or min(waits) == 0:
        return []
    in_flight = math.ceil(min(waits) / len(products))  # steps whose products may not be done
    definitions, found = loop.definitions(), []
    for place in products:
        for value in re.search(r"warp_group_dot (%[\w#]+), (%[\w#]+)", loop.body[place]).groups():
            buffer = _buffer(value, definitions)
            copies = [i for i, line in enumerate(loop.body) if buffer in _copied(line, definitions)]
            buffers = _buffers(definitions.get(buffer, ""))
            ahead = sum(buffer in _copied(line, definitions) for line in loop.before)
            if buffers and copies and buffers < ahead + in_flight + (min(copies) < place):
                found.append(buffer)
    return found


def _buffer(value: str, definitions: dict[str, str]) -> str:
    """The allocation that `value` is a view of."""
    while any(view in definitions.get(value, "") for view in VIEWS):
        value = re.search(r"%[\w#]+", definitions[value])[0]
    return value


def _buffers(definition: str) -> int:
    """How many buffers an allocation holds; 0 for what is none: an argument of the loop, a value in registers."""
    found = re.match(ALLOCATION, definition)
    sizes = found[1].split("x") if found else []
    return int(sizes[0]) if len(sizes) > 2 else len(sizes) // 2  # [B, rows, columns]; [rows, columns] is one


def _copied(line: str, definitions: dict[str, str]) -> set[str]:
    """The allocations that a line copies into."""
    if not any(copy in line for copy in COPIES):
        return set()
    return {_buffer(value, definitions) for value in re.findall(r"%[\w#]+", line.partition(" = ")[2] or line)}
