"""LLaVA JSON: reading it, and refusing what cannot be trained on with the file and the record by name.

What published files hold beside plain questions and answers, and what becomes of it:

    an answer first                       left out (ShareGPT's part of LLaVA-665K; LLaVA does so, too)
    a question last, without an answer    left out
    a system turn first                   the conversation's system prompt, in place of the template's
    <image> inside of a question          put before that question; the first, if there are several
    an image that no question names       put before the first question
    JSON lines, a byte-order mark, \\r\\n  read as they are meant
    an image that is missing (OCR-VQA's), a conversation without an answer, a system turn later on, two turns of one
    speaker, <image> without an image or in an answer: bad, see --skip-bad-samples
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from libmoe_fast.errors import DataError
from libmoe_fast.train.chat import IMAGE
from libmoe_fast.train.table import Record, RecordTable, TableWriter

READ_AT_A_TIME = 1 << 22  # characters


@dataclass(kw_only=True)
class Records:
    """What was read from a file.

    Args:
        good: records that can be trained on, each with its "index" in the file, questions and answers in turn.
        skipped: one line for each that was left out.
        mended: how many records had what, of those that needed mending.
    """

    good: RecordTable
    skipped: list[str] = field(default_factory=list)
    mended: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ", ".join(f"{number:,} with {what}" for what, number in sorted(self.mended.items()))
        mended = f", mended: {kinds}" if kinds else ""
        return f"{len(self.good):,} records, {len(self.skipped):,} left out{mended}"


def read_records(file: Path, images: Path, *, skip_bad: bool, table: Path | None = None) -> Records:
    """The records of a file that can be trained on. The file is read in parts, and is never in memory as a whole.

    Args:
        file: JSON list, or JSON lines, of {id, image (absent = text only), conversations: [{from: human|gpt, value}]}.
        images: folder that image paths start from.
        skip_bad: leave out bad records instead of raising at the first.
        table: file that the records are kept in while they are used; none given = a temporary one.

    Raises:
        DataError: the file cannot be read (whatever skip_bad says), or a record cannot be used.
    """
    skipped: list[str] = []
    mended: Counter = Counter()
    with TableWriter(table) as writer:
        for index, (record, text) in enumerate(_parse(file)):
            kinds = _mend(record)
            problem = _problem(record, images)
            if problem is None:
                writer.add(index, record, json.dumps(record) if kinds else text)
                mended.update(kinds)
            elif skip_bad:
                skipped.append(f"{name_record(file, index, record)}: {problem}")
            else:
                raise DataError(f"{name_record(file, index, record)}: {problem} (--skip-bad-samples leaves it out)")
    if not writer.rows:
        raise DataError(f"{file}: no record can be used ({len(skipped)} bad)")
    return Records(good=writer.table, skipped=skipped, mended=mended)


def _mend(record: Any) -> list[str]:
    """Changes what is not a bare sequence of questions and answers but means one; returns what it was."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return []
    kinds = []
    if turns and turns[0].get("from") == "system" and isinstance(turns[0].get("value"), str):
        record["system"] = turns.pop(0)["value"]
        kinds.append("a system turn")
    if len(turns) > 1 and turns[0].get("from") == "gpt":
        turns.pop(0)
        kinds.append("an answer first")
    if len(turns) > 1 and turns[-1].get("from") == "human" and turns[-2].get("from") == "gpt":
        turns.pop()
        kinds.append("a question last")
    return kinds


def name_record(file: Path, index: int, record: Any) -> str:
    name = record.get("id") if isinstance(record, dict) else None
    return f"{file}: record {index}" + (f" (id {name!r})" if name is not None else "")


def _parse(file: Path) -> Iterator[tuple[Any, str]]:
    """The values in a file, each with its text. What is wrong with the file is found out by reading it as a whole."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:  # a byte-order mark is no content
            yield from _values_of(stream)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        _parse_whole(file)
        raise DataError(f"{file}: cannot be read in parts: {error}") from error


class _PartsError(ValueError):
    """The text is not a list of values, nor values one after the other."""


def _values_of(stream: TextIO) -> Iterator[tuple[Any, str]]:
    """The values of a JSON list, or of JSON lines, with the text of each, a part of the stream at a time."""
    decoder = json.JSONDecoder()
    text, position, ended = "", 0, False

    def more() -> bool:
        """Reads on; False at the end."""
        nonlocal text, position, ended
        part = stream.read(READ_AT_A_TIME)
        text, position, ended = text[position:] + part, 0, not part
        return not ended

    def next_character() -> str:
        """The next one that is not white space, "" at the end."""
        nonlocal position
        while True:
            while position < len(text) and text[position] in " \t\r\n":
                position += 1
            if position < len(text) or not more():
                return text[position : position + 1]

    lists = next_character() == "["
    position += lists
    count, held = 0, None  # the first of JSON lines waits for a second: one value alone on its line is no list of any
    while (character := next_character()) and not (lists and character == "]"):
        if lists and count:
            if character != ",":
                raise _PartsError("no comma between two values")
            position += 1
            next_character()
        while True:
            try:
                value, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError:
                if not more():
                    raise
                continue
            if end < len(text) or ended or not more():  # a number may go on
                break
        count += 1
        found = value, text[position:end]
        if lists or count > 1:
            if held is not None:
                yield held
            held = None
            yield found
        else:
            held = found
        position = end
    if held is not None and "\n" in held[1]:
        yield held
    if lists:
        position += 1
        if not character or next_character():
            raise _PartsError("the list does not end, or more follows it")
    elif count < 2 and (held is None or "\n" not in held[1]):
        raise _PartsError("one value, which is no list")


def _parse_whole(file: Path) -> None:
    """Raises DataError that says where a file is malformed."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    try:
        lines = text.lstrip().startswith("{") and "\n" in text.strip()  # one record on each
        records = list(_values(text, 0)) if lines else json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: malformed JSON {_where(text, error)}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting of thousands of levels
        raise DataError(f"{file}: JSON that cannot be read: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: holds a JSON {type(records).__name__}; expected a list of records")


def _values(text: str, position: int, between: str = " \t\r\n") -> Iterator[Any]:
    """The JSON values from a position on, whatever is `between` them; errors name positions in the whole text."""
    decoder = json.JSONDecoder()
    while True:
        while position < len(text) and text[position] in between:
            position += 1
        if position == len(text):
            return
        value, position = decoder.raw_decode(text, position)
        yield value


def _where(text: str, error: json.JSONDecodeError) -> str:
    complete = _complete_records(text)
    last = f", after {len(complete)} complete records"
    if complete and isinstance(complete[-1], dict) and "id" in complete[-1]:
        last += f" (the last has id {complete[-1]['id']!r})"
    # A string that never ends is reported where it starts, so the position alone does not tell.
    half_written = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return f"at line {error.lineno}, column {error.colno}{last}" + (
        "; the file looks half-written: copy or download it again" if half_written else ""
    )


def _complete_records(text: str) -> list[Any]:
    records = []
    with suppress(json.JSONDecodeError):
        for record in _values(text, text.find("[") + 1, between=" \t\r\n,"):
            records.append(record)
    return records


def _problem(record: Any, images: Path) -> str | None:
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return f"is a JSON {type(record).__name__}; expected an object with conversations"
    return _conversation_problem(record.get("conversations")) or _image_problem(record, images)


def _conversation_problem(turns: Any) -> str | None:
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) and "from" in turn for turn in turns
    ):
        return "conversations must be a list of {from, value}"
    for position, turn in enumerate(turns):
        expected = ("human", "gpt")[position % 2]
        if turn["from"] != expected:
            return f"turn {position} is from {turn['from']!r}; expected {expected!r} (human and gpt take turns)"
        if not _is_text(turn["value"]):
            return f"turn {position} holds half a character (a lone surrogate), which no encoding can write"
        if expected == "gpt" and not turn["value"].strip():
            return f"the answer in turn {position} is empty"
    if not turns:
        return "the conversation is empty"
    if len(turns) % 2:
        return "the conversation ends without an answer"
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_problem(record: Record, images: Path) -> str | None:
    image, expected = record.get("image"), int("image" in record)
    if expected and not isinstance(image, str):
        return f"image is {image!r}; expected one path"
    if any(IMAGE in turn["value"] for turn in record["conversations"][1::2]):
        return f"an answer contains {IMAGE}"
    if not expected and any(IMAGE in turn["value"] for turn in record["conversations"]):
        return f"has no image, but {IMAGE} in its questions"
    if expected and image.startswith("data:"):
        return "image is a data URI; expected the path of a file: decode it into one"
    return _file_problem(os.path.join(images, image)) if expected else None


def _file_problem(path: str) -> str | None:
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else f"image {path} is no file"
    except FileNotFoundError:
        return f"image {path} does not exist"
    except (OSError, ValueError) as error:  # a name longer than the file system takes, or with a zero byte
        return f"image {str(path)[:100]!r} is no file name: {error}"
