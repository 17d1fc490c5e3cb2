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
class _Code:
    """lines: of a kernel, without their locations. definitions: value -> the operation that makes it."""

    lines: list[str]
    definitions: dict[str, str]

    def buffer(self, value: str) -> str:
        """The allocation that `value` is a view of."""
        while any(view in self.definitions.get(value, "") for view in VIEWS):
            value = re.search(r"%[\w#]+", self.definitions[value])[0]
        return value

    def buffers(self, allocation: str) -> int:
        """How many buffers an allocation holds; 0 where it is none: an argument of the loop, a value in registers."""
        found = re.match(ALLOCATION, self.definitions.get(allocation, ""))
        sizes = found[1].split("x") if found else []
        return int(sizes[0]) if len(sizes) > 2 else len(sizes) // 2  # [B, rows, columns]; [rows, columns] is one

    def copied(self, line: str) -> set[str]:
        """The allocations that a line copies into."""
        if not any(copy in line for copy in COPIES):
            return set()
        return {self.buffer(value) for value in re.findall(r"%[\w#]+", line.partition(" = ")[2] or line)}


def races(ttgir: str) -> list[str]:
    """The buffers of a kernel that are overwritten while a product may still read them."""
    lines = [re.sub(r" loc\(.*$", "", line) for line in ttgir.splitlines()]
    pattern = re.compile(r"\s*(%[\w#]+)(?::\d+)? = (.*)")
    code = _Code(lines=lines, definitions={m[1]: m[2] for line in lines if (m := pattern.match(line))})
    return sorted({buffer for loop in _loops(lines) for buffer in _races_of(loop, code)})


def _loops(lines: list[str]) -> list[list[int]]:
    """The lines of each loop's body, without loops inside it. A loop ends where a brace closes at its own depth."""
    spans = []
    for start, line in enumerate(lines):
        if re.search(r"\bscf\.(for|while)\b", line):
            depth = len(line) - len(line.lstrip())
            closing = (i for i in range(start + 1, len(lines)) if re.match(rf" {{{depth}}}}}", lines[i]))
            spans.append((start, next(closing, len(lines))))
    return [
        [
            i
            for i in range(start + 1, stop)
            if not any(start < inner <= i <= end < stop for inner, end in spans if (inner, end) != (start, stop))
        ]
        for start, stop in spans
    ]


def _races_of(loop: list[int], code: _Code) -> list[str]:
    body = [(i, code.lines[i]) for i in loop]
    waits = [int(n) for _, line in body for n in re.findall(r"warp_group_dot_wait.*pendings = (\d+)", line)]
    products = [(i, line) for i, line in body if "warp_group_dot " in line and "isAsync = true" in line]
    if not products or not waits:
        return []
    in_flight = math.ceil(min(waits) / len(products))  # steps whose products may not be done
    if in_flight == 0:
        return []
    found = []
    for place, line in products:
        for value in re.search(r"warp_group_dot (%[\w#]+), (%[\w#]+)", line).groups():
            buffer = code.buffer(value)
            copies = [i for i, other in body if buffer in code.copied(other)]
            if code.buffers(buffer) == 0 or not copies:
                continue
            ahead = sum(buffer in code.copied(other) for other in code.lines[: loop[0]])
            if code.buffers(buffer) < ahead + in_flight + (min(copies) < place):
                found.append(buffer)
    return found
