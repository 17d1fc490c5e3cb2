"""Chat formats and label masks, against texts written by hand."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from libmoe_fast.errors import DataError
from libmoe_fast.train.chat import IGNORED, TEMPLATES, conversation_turns, encode
from libmoe_fast.train.tiny import SPECIAL_TOKENS, tiny_llava, tiny_tokenizer

CORPUS = ["What digit is this? It is 3. Sure? Yes.", "You are a helpful assistant."] * 5


def record(*values: str, image: bool = True) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns} | ({"image": "a.png"} if image else {})


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As real Phi-3's: a space in front of every word and piece, special tokens that swallow the white space after."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=[*map(chr, range(10, 127)), "▁"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>")


# Two kinds of offsets: byte-level ones that are exact, and ones where a special token covers the newline after it.
TOKENIZERS = {"byte_level": lambda: tiny_tokenizer(CORPUS), "metaspace": metaspace_tokenizer}

# Conversation, format -> the text before the image is repeated, and what gets labels.
CASES = {
    "phi3": (
        "phi3",
        record("<image>\nWhat digit is this?", "It is 3."),
        "<s><|user|>\n<image>\nWhat digit is this?<|end|>\n<|assistant|>\nIt is 3.<|end|>\n",
        ["It is 3.<|end|>"],
    ),
    "phi3.5": (  # a system turn first
        "phi3.5",
        record("<image>\nWhat digit is this?", "It is 3."),
        "<s><|system|>\nYou are a helpful assistant.<|end|>\n"
        "<|user|>\n<image>\nWhat digit is this?<|end|>\n<|assistant|>\nIt is 3.<|end|>\n",
        ["It is 3.<|end|>"],
    ),
    "multi_turn": (  # both answers, and nothing of the question between; the image moves to the front
        "phi3",
        record("What digit is this?\n<image>", "It is 3.", "Sure?", "Yes."),
        "<s><|user|>\n<image>\nWhat digit is this?<|end|>\n<|assistant|>\nIt is 3.<|end|>\n"
        "<|user|>\nSure?<|end|>\n<|assistant|>\nYes.<|end|>\n",
        ["It is 3.<|end|>", "Yes.<|end|>"],
    ),
    "text_only": (
        "phi3",
        record("Sure?", "Yes.", image=False),
        "<s><|user|>\nSure?<|end|>\n<|assistant|>\nYes.<|end|>\n",
        ["Yes.<|end|>"],
    ),
    "answer_in_question": (  # the mask goes by place, not by text
        "phi3",
        record("Yes.", "Yes.", image=False),
        "<s><|user|>\nYes.<|end|>\n<|assistant|>\nYes.<|end|>\n",
        ["Yes.<|end|>"],
    ),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("case", CASES)
def test_labels_cover_answers_and_their_end(case, tokenizer):
    template, rec, text, answers = CASES[case]
    tokenizer = TOKENIZERS[tokenizer]()
    ids, labels = encode(conversation_turns(rec), tokenizer, TEMPLATES[template], image_tokens=3, max_length=512)
    whole = tokenizer(text.replace("<image>", "<image>" * 3), add_special_tokens=False)["input_ids"]
    assert ids == whole
    assert [label for label in labels if label != IGNORED] == [
        i for i, label in zip(ids, labels, strict=True) if label != IGNORED
    ]
    runs = _runs(labels)
    assert [tokenizer.decode(run).replace(" <|end|>", "<|end|>").strip() for run in runs] == answers


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("token", ["<s>", "<|end|>", "<|user|>", "<image>", "<unk>"])
def test_text_stays_text(token, tokenizer):
    """A control token's name that somebody wrote is spelled out, in questions and in answers; the format's own stay."""
    tokenizer = TOKENIZERS[tokenizer]()
    options = {"image_tokens": 3, "max_length": 512}
    turns = [("<image>\nWhat is a sign?", "A sign is it.")]
    ids, labels = encode(turns, tokenizer, TEMPLATES["phi3"], **options)
    written = [(f"<image>\nWhat is {token} a sign?", f"A {token} sign is it.")]
    more, more_labels = encode(written, tokenizer, TEMPLATES["phi3"], **options)
    control = set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    assert [i for i in more if i in control] == [i for i in ids if i in control]
    assert [i for i in more_labels if i in control] == [i for i in labels if i in control]
    answer = tokenizer.decode([i for i in more_labels if i != IGNORED and i not in control])
    assert answer.replace(" ", "") == written[0][1].replace(" ", "")


def _runs(labels: list[int]) -> list[list[int]]:
    runs, open_run = [], False
    for label in labels:
        if label == IGNORED:
            open_run = False
        elif open_run:
            runs[-1].append(label)
        else:
            runs.append([label])
            open_run = True
    return runs


def test_rendering_equals_the_jinja_template_that_evaluation_uses():
    _, processor = tiny_llava(vocab_texts=CORPUS)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What digit is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 3."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    for name in ("phi3", "phi3.5"):
        text = processor.apply_chat_template(messages, chat_template=TEMPLATES[name].jinja, tokenize=False)
        rec = record("<image>\nWhat digit is this?", "It is 3.", "Sure?", "Yes.")
        assert TEMPLATES[name].render(conversation_turns(rec), "<s>")[0] == text


def test_truncation_keeps_the_front():
    tokenizer = tiny_tokenizer(CORPUS)
    turns = conversation_turns(record("<image>\nWhat digit is this?", "It is 3.", "Sure?", "Yes."))
    options = {"image_tokens": 3}
    ids, labels = encode(turns, tokenizer, TEMPLATES["phi3"], max_length=512, **options)
    first_answer_end = labels.index(tokenizer.convert_tokens_to_ids("<|end|>")) + 1
    cut = encode(turns, tokenizer, TEMPLATES["phi3"], max_length=first_answer_end, **options)
    assert cut == (ids[:first_answer_end], labels[:first_answer_end])


@pytest.mark.parametrize(
    ("max_length", "message"),
    [
        (4, "cuts into the image"),  # <s> <|user|> \n <image>: one of three image tokens
        (6, "no answer is left"),  # the image fits, nothing else
    ],
)
def test_truncation_refuses_half_an_image_and_no_answer(max_length, message):
    turns = conversation_turns(record("<image>\nWhat digit is this?", "It is 3."))
    with pytest.raises(DataError, match=message):
        encode(turns, tiny_tokenizer(CORPUS), TEMPLATES["phi3"], image_tokens=3, max_length=max_length)
