"""Records and batches: every bad input gives its error and its name, and skipping loses nothing else."""

import contextlib
import json
import os
import pickle
import signal
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from libmoe_fast.cli import main
from libmoe_fast.errors import DataError
from libmoe_fast.train import records
from libmoe_fast.train.chat import IGNORED, conversation_turns
from libmoe_fast.train.config import DataConfig
from libmoe_fast.train.data import ConversationDataset, batches, make_collator
from libmoe_fast.train.records import read_records
from libmoe_fast.train.sampler import ModalityLengthSampler
from libmoe_fast.train.tiny import tiny_llava

IMAGE_TOKENS = 16  # 32 x 32 px in patches of 8


@pytest.fixture(scope="module")
def processor():
    return tiny_llava(vocab_texts=["What digit is this? 3 Hello Hi"])[1]


def good(index: int, *, image: bool = True) -> dict:
    question = "<image>\nWhat digit is this?" if image else "Hello"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "3"}]
    return {"id": f"n{index}", "conversations": turns} | ({"image": "good.png"} if image else {})


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def open_dataset(folder, records, processor, **options) -> ConversationDataset:
    (folder / "data.json").write_text(records if isinstance(records, str) else json.dumps(records))
    config = DataConfig(file=str(folder / "data.json"), workers=0, **options)
    return ConversationDataset(config, processor, image_tokens=IMAGE_TOKENS, template="phi3")


BAD_ON_OPENING = {
    "missing image": (good(1) | {"image": "none.png"}, "none.png does not exist"),
    "no answer": (good(1) | {"conversations": turns(("human", "<image>"))}, "ends without an answer"),
    "empty answer": (
        good(1) | {"conversations": turns(("human", "<image>"), ("gpt", " "))},
        "answer in turn 1 is empty",
    ),
    "empty conversation": (good(1) | {"conversations": []}, "conversation is empty"),
    "no conversation": ({"id": "n1"}, "conversations must be a list"),
    "two questions in a row": (
        good(1) | {"conversations": turns(("human", "<image>"), ("human", "and?"), ("gpt", "3"))},
        "turn 1 is from 'human'; expected 'gpt'",
    ),
    "answer first": (good(1) | {"conversations": turns(("gpt", "3"))}, "turn 0 is from 'gpt'; expected 'human'"),
    "<image> without image": (
        {"id": "n1", "conversations": turns(("human", "<image>\nHi"), ("gpt", "3"))},
        "has no image, but <image>",
    ),
    "<image> in an answer": (
        good(1) | {"conversations": turns(("human", "Hi"), ("gpt", "<image>"))},
        "an answer contains <image>",
    ),
    "a system turn later on": (
        good(1) | {"conversations": turns(("human", "<image>"), ("gpt", "3"), ("system", "Be brief."), ("gpt", "3"))},
        "turn 2 is from 'system'; expected 'human'",
    ),
    "a question only": (good(1) | {"conversations": turns(("human", "<image>"))}, "ends without an answer"),
    "data URI": (good(1) | {"image": "data:image/png;base64,iVBORw0KGgo"}, "data URI; expected the path"),
    "half a character": (
        good(1) | {"conversations": turns(("human", "<image>"), ("gpt", "yes \ud83d"))},
        "turn 1 holds half a character",
    ),
    "endless name": (good(1) | {"image": "x" * 5000}, "is no file name"),
    "two images": (good(1) | {"image": ["good.png", "good.png"]}, "expected one path"),
    "not an object": ("n1", "is a JSON str"),
}


@pytest.mark.parametrize("case", BAD_ON_OPENING)
def test_bad_record_is_named_or_skipped(case, folder, processor):
    record, message = BAD_ON_OPENING[case]
    records = [good(0), record, good(2)]
    name = "record 1" + (" (id 'n1')" if isinstance(record, dict) else "")
    with pytest.raises(DataError) as error:
        open_dataset(folder, records, processor)
    assert f"data.json: {name}" in str(error.value)
    assert message in str(error.value)
    dataset = open_dataset(folder, records, processor, skip_bad_samples=True)
    assert [r["id"] for r in dataset.records] == ["n0", "n2"]
    assert len(dataset.skipped) == 1
    assert message in dataset.skipped[0]


PUBLISHED = {  # turns of a published record -> the questions and answers that it means, and its system prompt
    "an answer first": ([("gpt", "Hi."), ("human", "<image>\nWhat?"), ("gpt", "3")], [("<image>\nWhat?", "3")], None),
    "a question last": (
        [("human", "<image>\nWhat?"), ("gpt", "3"), ("human", "And?")],
        [("<image>\nWhat?", "3")],
        None,
    ),
    "a system turn": (
        [("system", "Be brief."), ("human", "<image>\nWhat?"), ("gpt", "3")],
        [("<image>\nWhat?", "3")],
        "Be brief.",
    ),
    "<image> in the middle": (
        [("human", "What is <image> this?"), ("gpt", "3")],
        [("<image>\nWhat is  this?", "3")],
        None,
    ),
    "<image> twice": (
        [("human", "<image><image>\nWhat?"), ("gpt", "3"), ("human", "<image>?"), ("gpt", "4")],
        [("<image>\nWhat?", "3"), ("?", "4")],
        None,
    ),
    "<image> in a later question": (
        [("human", "Hi"), ("gpt", "Hello"), ("human", "What? <image>"), ("gpt", "3")],
        [("Hi", "Hello"), ("<image>\nWhat?", "3")],
        None,
    ),
    "an image that no question names": ([("human", "What?"), ("gpt", "3")], [("<image>\nWhat?", "3")], None),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_quirks_of_published_files(case, folder, processor):
    given, expected, system = PUBLISHED[case]
    dataset = open_dataset(folder, [good(0), good(1) | {"conversations": turns(*given)}], processor)
    record = dataset.records[1]
    assert conversation_turns(record) == expected
    assert record.get("system") == system
    sample = dataset[1]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert sample.ids.count(image) == IMAGE_TOKENS
    start = ("<|system|>\n" + system + "<|end|>\n" if system else "") + "<|user|>\n"
    text = processor.tokenizer.decode(sample.ids).replace("<image>" * IMAGE_TOKENS, "<image>")
    assert text.startswith(f"<s>{start}")
    counted = read_records(folder / "data.json", folder, skip_bad=False)
    assert dict(counted.mended) == ({case: 1} if "<image>" not in case and "names" not in case else {})
    assert str(counted).startswith("2 records, 0 left out")


def test_a_sample_too_long_for_its_answer_is_left_out_and_counted(folder, processor):
    """Not an error, and not in need of --skip-bad-samples: nothing is wrong with it."""
    long = good(1) | {"conversations": turns(("human", "<image>\n" + "What digit? " * 50), ("gpt", "3"))}
    dataset = open_dataset(folder, [good(0), long, good(2)], processor, max_length=64)
    assert dataset[0].skipped == []
    sample = dataset[1]
    assert sample.ids == dataset[2].ids
    (line,) = sample.skipped
    assert line.count("record 1") == 1
    assert "no answer is left within max_length 64" in line


@pytest.mark.parametrize("end", [-3, -20, -60])  # after a value, inside a string, inside a record
def test_half_written_json_names_the_last_whole_record(end, folder, processor):
    text = json.dumps([good(0), good(1), good(2)])[:end]
    for skip in (False, True):  # nothing to skip: where the rest of the file went, nobody knows
        with pytest.raises(DataError, match=r"data\.json: malformed JSON at line 1, .*half-written") as error:
            open_dataset(folder, text, processor, skip_bad_samples=skip)
        assert "after 2 complete records (the last has id 'n1')" in str(error.value)


def test_malformed_json_names_line_and_column(folder, processor):
    text = json.dumps([good(0), good(1)], indent=1).replace('"id": "n1"', '"id" "n1"')
    line = next(number for number, row in enumerate(text.splitlines(), 1) if '"id" "n1"' in row)
    with pytest.raises(DataError, match=rf"malformed JSON at line {line}, column 8, after 1 complete") as error:
        open_dataset(folder, text, processor)
    assert "half-written" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "expected a list"),
        (b"\xff\xfe[]", "not UTF-8"),
        (b"[]", "no record can be used"),
        (b"[" * 100_000, "cannot be read"),
        (b"[" + b"9" * 5000 + b"]", "cannot be read"),
    ],
)
def test_foreign_file(content, message, folder, processor):
    (folder / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ConversationDataset(
            DataConfig(file=str(folder / "data.json")), processor, image_tokens=IMAGE_TOKENS, template="phi3"
        )


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda records: "\ufeff" + json.dumps(records), id="byte-order mark"),
        pytest.param(lambda records: "\n".join(map(json.dumps, records)) + "\n", id="JSON lines"),
        pytest.param(lambda records: "\r\n\r\n".join(map(json.dumps, records)), id="Windows JSON lines"),
        pytest.param(lambda records: json.dumps(records, indent=1), id="indented"),
    ],
)
def test_other_ways_to_write_the_same_records(write, folder, processor):
    expected = open_dataset(folder, [good(0), good(1, image=False)], processor)
    (folder / "data.json").write_text(write([good(0), good(1, image=False)]), encoding="utf-8")
    config = DataConfig(file=str(folder / "data.json"))
    dataset = ConversationDataset(config, processor, image_tokens=IMAGE_TOKENS, template="phi3")
    assert [dataset[i].ids for i in range(2)] == [expected[i].ids for i in range(2)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 22])  # from every character to all at once
def test_a_file_is_read_in_parts(size, folder, monkeypatch):
    """Escapes, numbers and records that a part's end cuts through; JSON and JSON lines."""
    monkeypatch.setattr(records, "READ_AT_A_TIME", size)
    odd = good(1, image=False)
    odd["conversations"][1]["value"] = 'a "quote", \\ a backslash, é 漢 😀 \n and -1.5e3'
    given = [good(0), odd | {"score": -12.5e-3, "nested": [[], {"a": None}, True]}, good(2) | {"id": 1234567}]
    for ascii_only in (True, False):
        for text in (
            json.dumps(given, ensure_ascii=ascii_only),
            json.dumps(given, indent=2, ensure_ascii=ascii_only),
            "\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in given),
        ):
            (folder / "data.json").write_text(text, encoding="utf-8")
            found = read_records(folder / "data.json", folder, skip_bad=False)
            assert [{**record, "index": None} for record in found.good] == [{**one, "index": None} for one in given]
            assert [record["index"] for record in found.good] == [0, 1, 2]
            assert found.good.has_image == [True, False, True]
            assert found.good.lengths == [sum(len(t["value"]) for t in one["conversations"]) for one in given]


@pytest.mark.parametrize("text", ["[1 2]", "[1,]", "[", "[1", "[1]]", "{}", "[1],[2]", '{"a": 1} [', "", "1", "[1]x"])
def test_what_is_no_list_of_values(text, folder):
    (folder / "data.json").write_text(text)
    with pytest.raises(DataError, match=r"data\.json"):
        read_records(folder / "data.json", folder, skip_bad=True)


def test_records_cost_no_memory_of_their_own(folder, monkeypatch):
    """40 MB of records, read in parts of 64 kB: a batch of the table at the most, and next to nothing afterwards."""
    monkeypatch.setattr(records, "READ_AT_A_TIME", 1 << 16)
    text = json.dumps(good(0, image=False) | {"note": "x" * 8000})
    with (folder / "data.json").open("w") as file:
        file.writelines([f"{text}\n"] * 5000)
    tracemalloc.start()
    found = read_records(folder / "data.json", folder, skip_bad=False)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.good) == 5000
    assert (folder / "data.json").stat().st_size > 40_000_000
    assert kept < 1_000_000
    assert peak < 20_000_000  # a batch is 1,024 records, of 8 kB here


def test_another_process_maps_the_same_table(folder, tmp_path):
    (folder / "data.json").write_text(json.dumps([good(i) for i in range(20)]))
    table = read_records(folder / "data.json", folder, skip_bad=False, table=tmp_path / "records.arrow").good
    some = pickle.loads(pickle.dumps(table.share([3, 1, 7])))
    assert [record["id"] for record in some] == ["n3", "n1", "n7"]
    assert (len(table), len(some), table[-1]["id"], some.has_image) == (20, 3, "n19", [True] * 3)
    with pytest.raises(IndexError):
        some[3]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["id", "image", "conversations", "from", "value"]) | st.text(), inner)
    ),
)


@given(ANY_JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_record_is_read_or_refused_by_name(folder, record):
    """Whatever JSON a record is: one line that names it, or a record that can be used."""
    (folder / "data.json").write_text(json.dumps([good(0), record]))
    with contextlib.suppress(DataError):
        read_records(folder / "data.json", folder, skip_bad=False)
    records = read_records(folder / "data.json", folder, skip_bad=True)
    assert len(records.good) + len(records.skipped) == 2
    assert all("record 1" in line and "\n" not in line for line in records.skipped)


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_refused_by_name(folder, content):
    (folder / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.json"):
        read_records(folder / "data.json", folder, skip_bad=True)


def test_missing_file(folder, processor):
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        ConversationDataset(
            DataConfig(file=str(folder / "none.json")), processor, image_tokens=IMAGE_TOKENS, template="phi3"
        )


def sampler(dataset, batch_size):
    return ModalityLengthSampler(
        dataset.lengths,
        dataset.has_image,
        batch_size=batch_size,
        accumulation=1,
        world_size=1,
        rank=0,
        seed=0,
        steps=1,
    )


@pytest.mark.parametrize("workers", [0, 1])  # an error must come out of a worker process as the same one line
def test_broken_image_is_named_or_replaced(workers, folder, processor):
    records = [good(0), good(1) | {"image": "broken.png"}, good(2, image=False), good(3)]
    dataset = open_dataset(folder, records, processor)
    dataset.config.workers = workers
    collator = make_collator(processor, IMAGE_TOKENS)
    with pytest.raises(
        DataError, match=r"data\.json: record 1 \(id 'n1'\): image .*broken\.png cannot be read"
    ) as error:
        list(batches(dataset, sampler(dataset, 4), collator))
    assert "\n" not in str(error.value)
    dataset = open_dataset(folder, records, processor, skip_bad_samples=True)
    dataset.config.workers = workers
    (batch,) = batches(dataset, sampler(dataset, 4), collator)
    assert batch.inputs["pixel_values"].shape[0] == 3  # another image stands in, not the text between them
    assert len(batch.skipped) == 1
    assert "record 1 (id 'n1')" in batch.skipped[0]


def test_a_killed_worker_is_one_line(folder, processor, monkeypatch):
    monkeypatch.setattr(ConversationDataset, "_pixels", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    dataset = open_dataset(folder, [good(0)], processor)
    dataset.config.workers = 1
    with pytest.raises(DataError, match=r"a process that loads images died .*worker.*: lower data") as error:
        list(batches(dataset, sampler(dataset, 1), make_collator(processor, IMAGE_TOKENS)))
    assert "\n" not in str(error.value)


def test_all_images_broken(folder, processor):
    records = [good(0) | {"image": "broken.png"}, good(1, image=False)]
    dataset = open_dataset(folder, records, processor, skip_bad_samples=True)
    with pytest.raises(DataError, match=r"no sample of the kind of .*record 0"):
        dataset[0]


def test_image_aspect_none_leaves_the_image_alone(folder, processor):
    padded = open_dataset(folder, [good(0)], processor)[0].pixels
    cropped = open_dataset(folder, [good(0)], processor, image_aspect="none")[0].pixels
    assert padded.shape == cropped.shape == (3, 32, 32)
    assert padded[0, 0, 0] != cropped[0, 0, 0]  # red reaches the corner only without padding


def test_a_share_of_the_records(folder, processor):
    """Drawn once for all seeds of a run: another draw has its own seed. In the file's order, and no record twice."""
    records = [good(i, image=i % 2 == 0) for i in range(101)]
    draws = [
        [record["index"] for record in open_dataset(folder, records, processor, **options).records]
        for options in (
            {"fraction": 0.5},
            {"fraction": 0.5},
            {"fraction": 0.5, "fraction_seed": 1},
            {"fraction": 0.001},
            {"fraction": 1.0},
        )
    ]
    assert draws[0] == draws[1] == sorted(set(draws[0]))
    assert draws[0] != draws[2]
    assert [len(draw) for draw in draws] == [50, 50, 50, 1, 101]
    assert 15 <= sum(index % 2 == 0 for index in draws[0]) <= 35  # images and texts alike


def test_batch_is_padded_and_masked(folder, processor):
    dataset = open_dataset(folder, [good(0), good(1, image=False)], processor)
    short, long = sorted((dataset[0], dataset[1]), key=lambda sample: len(sample.ids))
    batch = make_collator(processor, IMAGE_TOKENS)([long, short])
    pad = processor.tokenizer.pad_token_id
    extra = len(long.ids) - len(short.ids)
    assert extra > 0
    assert batch.inputs["input_ids"][1].tolist() == short.ids + [pad] * extra
    assert batch.inputs["labels"][1].tolist() == short.labels + [IGNORED] * extra
    assert batch.inputs["attention_mask"].sum(1).tolist() == [len(long.ids), len(short.ids)]
    assert (batch.tokens, batch.labels, batch.text_only) == (
        len(long.ids) + len(short.ids),
        4,
        False,
    )  # "3<|end|>" twice


def test_text_only_batch_brings_a_dummy_image_without_labels(folder, processor):
    dataset = open_dataset(folder, [good(0, image=False)], processor)
    batch = make_collator(processor, IMAGE_TOKENS)([dataset[0]])
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert batch.text_only
    assert (batch.inputs["input_ids"] == image_id).sum() == IMAGE_TOKENS
    assert batch.inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert torch.all(batch.inputs["labels"][1] == IGNORED)
    assert (batch.tokens, batch.labels) == (len(dataset[0].ids), 2)


def test_data_check_reads_all_and_says_what_is_wrong(folder, tmp_path, capsys):
    records = [good(0), good(1) | {"image": "broken.png"}, good(2) | {"image": "broken.png"}, good(3, image=False)]
    records += [good(4) | {"image": f"gone{i}.png"} for i in range(5)] + [{"id": "x"}]
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "fine.json").write_text(json.dumps([good(0), good(1, image=False)]))
    command = ["data", "check", str(folder / "data.json"), "--list", str(tmp_path / "list.txt"), "--workers", "1"]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "4 records, 6 left out" in printed
    assert "3 with an image, 1 of text alone" in printed
    assert "2 images decoded, 2 broken" in printed
    assert "5 x image FILE does not exist" in printed
    assert "and 2 more" in printed
    assert "would leave out 8" in printed
    listed = (tmp_path / "list.txt").read_text().splitlines()
    assert len(listed) == 8
    assert all(any(f"record {i} " in line or f"record {i}:" in line for i in range(10)) for line in listed)
    assert main([*command, "--no-decode"]) == 1
    assert "decoded" not in capsys.readouterr().out
    assert main(["data", "check", str(folder / "fine.json")]) == 0
    assert "all good" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_data_check_counts_the_tokens_of_training(folder, processor, tmp_path, capsys, workers):
    """Against what the data set makes of each record. The third is longer than max_length; the fourth's answer begins
    beyond it.
    """
    long = "five and " * 30
    records = [good(0), good(1, image=False), good(2), good(3)]
    records[2]["conversations"][1]["value"] = long
    records[3]["conversations"][0]["value"] += long
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    samples = [open_dataset(folder, [record], processor, max_length=2000)[0] for record in records]
    (folder / "data.json").write_text(json.dumps(records))
    image, limit = 3 * IMAGE_TOKENS, IMAGE_TOKENS + 40
    text = sum(len(sample.ids) for sample in samples) - image
    answers = sum(label != IGNORED for sample in samples for label in sample.labels)
    command = ["data", "check", str(folder / "data.json"), "--workers", str(workers), "--no-decode"]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--image_tokens", str(IMAGE_TOKENS)]
    assert main([*command, "--max_length", str(limit)]) == 0
    printed = capsys.readouterr().out
    assert f"{image:,} tokens of images and {text:,} of text, {answers:,} of them in answers" in printed
    assert f"the longest sample {max(len(sample.ids) for sample in samples):,}" in printed
    assert f"2 are longer than {limit} and cut, 1 of those before any answer" in printed
