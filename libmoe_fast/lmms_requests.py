"""lmms-eval's requests: what they ask for, in which batches, and the chats that multi-round tasks write.

Nothing here knows a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

# The field(s) of a benchmark's documents that name their subtask.
CATEGORY_FIELDS = {
    "chartqa": ("type",),
    "hallusion_bench_image": ("category", "subcategory"),
    "mmbench_en_dev_static": ("category", "L2-category"),
    "mmstar": ("category", "l2_category"),
}
_DEFAULT_CATEGORY_FIELDS = ("category",)

_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
_GENERATION_OPTIONS = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")


MARK = "\ue000"  # of a place in a rendered chat: private use, in no tokenizer and no template
BLANK = "\u2003"  # around it, an em space: gone where the template strips what it is given


def filled(frame: str, written: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """A rendered chat with what people wrote in its places, and the spans of characters that this takes."""
    text, contents = "", []
    for i, piece in enumerate(re.split(f"({BLANK}?{MARK}[0-9]+{MARK}{BLANK}?)", frame)):
        if i % 2:
            content = written[int(piece.strip(BLANK).strip(MARK))]
            content = content if piece.startswith(BLANK) else content.lstrip()
            content = content if piece.endswith(BLANK) else content.rstrip()
            contents.append((len(text), len(text) + len(content)))
            piece = content
        text += piece
    return text, contents


class Rounds:
    """One request of a multi-round task: its answers, and what the task hands from round to round."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.messages: list[dict] | None = None  # of the round to come; None: there is none
        self._info: Any = None

    def prepare(self, doc_to_messages: Callable, doc: Mapping) -> None:
        if not self.answers:
            self.messages = doc_to_messages(doc)
            return
        told = {"previous_output": list(self.answers), "previous_round_info": self._info}
        given = doc_to_messages(doc, round_idx=len(self.answers), **told)
        terminal = True
        if isinstance(given, tuple) and len(given) == 4:  # a task of one round gives something else
            self.messages, terminal, _, self._info = given
        if terminal:
            self.messages = None


def batches(requests: list[Instance], size: int, wanted: Sequence[int]) -> Iterator[list[int]]:
    """Indices of wanted requests to answer together: equal settings, similar length (left padding stays short)."""
    groups: dict[str, list[int]] = {}
    for i in wanted:
        groups.setdefault(json.dumps(settings_of(requests[i]), sort_keys=True, default=str), []).append(i)
    for group in groups.values():
        group.sort(key=lambda i: len(requests[i].args[0]))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def settings_of(request: Instance) -> Mapping[str, Any]:
    return request.args[2]


def generation_options(settings: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """lmms-eval's gen_kwargs as arguments of `generate`; settings about prompts or other models are not ours."""
    options = {name: settings[name] for name in _GENERATION_OPTIONS if settings.get(name) is not None}
    options["max_new_tokens"] = int(settings.get("max_new_tokens") or max_new_tokens)
    temperature = settings.get("temperature") or 0.0
    options["do_sample"] = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
    for name in _SAMPLING_OPTIONS:
        options[name] = settings.get(name) if options["do_sample"] else None  # None: no warning about unused ones
    return options


def cut(text: str, until: str | Sequence[str] | None) -> str:
    stops = [until] if isinstance(until, str) else until or []
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def categories_of(task: str, doc: Mapping) -> dict[str, str]:
    fields = CATEGORY_FIELDS.get(task, _DEFAULT_CATEGORY_FIELDS)
    return {name: str(doc[name]) for name in fields if doc.get(name) is not None}


def is_padding(request: Instance) -> bool:
    """With several ranks, lmms-eval repeats the last request until all ranks hold as many."""
    return isinstance(request.metadata, dict) and bool(request.metadata.get("__padding_only__"))
