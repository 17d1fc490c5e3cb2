"""Chat formats: conversations to text, and text to tokens with labels on the answers only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from libmoe_fast.errors import DataError

IMAGE = "<image>"
IGNORED = -100  # the label that cross entropy leaves out

Span = tuple[int, int]  # of characters: first, and one after the last

_MESSAGES = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class NoAnswerError(DataError):
    """A sample is cut before its first answer begins: nothing of it trains."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat format in the Phi-3 family.

    Args:
        system: system prompt of a conversation that brings none, or None for no system turn.
    """

    system: str | None

    @property
    def jinja(self) -> str:
        """The same format for `processor.chat_template`, so that evaluation asks the way training taught."""
        if self.system is None:
            return "{{ bos_token }}" + _MESSAGES
        system = "{% if messages[0]['role'] != 'system' %}" + _turn("system", self.system) + "{% endif %}"
        return "{{ bos_token }}" + system + _MESSAGES

    def render(
        self, turns: Sequence[tuple[str, str]], bos: str, *, system: str | None = None
    ) -> tuple[str, list[Span], list[Span]]:
        """Text of alternating (question, answer) turns, and the character spans of questions and of answers.

        system: the conversation's own system prompt, in place of the format's.
        """
        prompt = self.system if system is None else system
        text = bos + ("" if prompt is None else _turn("system", prompt))
        questions, answers = [], []
        for question, answer in turns:
            start = len(text) + len("<|user|>\n")
            questions.append((start, start + len(question)))
            text += _turn("user", question) + "<|assistant|>\n"
            answers.append((len(text), len(text) + len(answer)))
            text += answer + "<|end|>\n"
        return text, questions, answers


def _turn(role: str, text: str) -> str:
    return f"<|{role}|>\n{text}<|end|>\n"


TEMPLATES = {
    "phi3": ChatTemplate(system=None),
    "phi3.5": ChatTemplate(system="You are a helpful assistant."),
}


def conversation_turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) turns of a checked record; its image, if any, goes before the first question that names it."""
    values = [turn["value"].strip() for turn in record["conversations"]]
    turns = list(zip(values[::2], values[1::2], strict=True))
    if "image" in record:
        place = next((i for i, (question, _) in enumerate(turns) if IMAGE in question), 0)
        turns = [(question.replace(IMAGE, "").strip(), answer) for question, answer in turns]
        turns[place] = (f"{IMAGE}\n{turns[place][0]}", turns[place][1])
    return turns


def encode(
    turns: Sequence[tuple[str, str]],
    tokenizer: Any,
    template: ChatTemplate,
    *,
    image_tokens: int,
    max_length: int,
    system: str | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids and labels (IGNORED outside answers), each of at most max_length entries.

    The text is tokenised once, and a token gets a label when it starts inside an answer: tokenising questions and
    answers apart, to find where answers begin, would disagree with the whole where tokens merge over the seam.

    What people wrote stays text: a `<|end|>` or `<s>` inside a question or an answer is no control token.

    Args:
        image_tokens: how many positions the image takes; its one `<image>` token is repeated so often.
        system: the conversation's own system prompt.

    Raises:
        NoAnswerError: max_length leaves no answer.
        DataError: max_length cuts into the image.
    """
    text, questions, answers = template.render(turns, tokenizer.bos_token or "", system=system)
    labelled = [(start, end + len("<|end|>")) for start, end in answers]
    # conversation_turns puts it there, and leaves no other.
    starts = (span[0] for span, (question, _) in zip(questions, turns, strict=True) if question.startswith(IMAGE))
    image_at = next(starts, None)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    ids: list[int] = []
    labels: list[int] = []
    contents = [*questions, *answers]
    if system is not None:
        contents.append((at := text.find("<|system|>\n") + len("<|system|>\n"), at + len(system)))
    for start, tokens in tokenize(text, contents, tokenizer, image_tokens=image_tokens, image_at=image_at):
        ids += tokens
        labels += tokens if _within(start, labelled) else [IGNORED] * len(tokens)
    if image_id in ids[max_length:]:
        raise DataError(f"max_length {max_length} cuts into the image's {image_tokens} tokens; raise data.max_length")
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        raise NoAnswerError(f"no answer is left within max_length {max_length}; raise data.max_length to keep it")
    return ids, labels


def encode_prompt(text: str, contents: Sequence[Span], tokenizer: Any, *, image_tokens: int) -> list[int]:
    """Token ids of a rendered chat that asks for an answer; what people wrote, `contents`, stays text."""
    return [token for _, tokens in tokenize(text, contents, tokenizer, image_tokens=image_tokens) for token in tokens]


def tokenize(
    text: str, contents: Sequence[Span], tokenizer: Any, *, image_tokens: int, image_at: int | None = None
) -> Iterator[tuple[int, list[int]]]:
    """The text's tokens, each with the character that it starts at: control tokens inside `contents` spelled out, those
    of images `image_tokens` times.

    image_at: where an `<image>` inside the contents does stand for an image.
    """
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        written = token in control and _within(start, contents)
        is_image = image_at is not None and start <= image_at < end
        if written and not is_image:
            yield start, plain_ids(text[start:end], tokenizer)
        else:
            yield start, [token] * (image_tokens if token == image_id else 1)


def _within(position: int, spans: Sequence[Span]) -> bool:
    return any(start <= position < end for start, end in spans)


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text in which nothing is a control token."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = before
