"""The lmms-eval plugin: answers, expert-selection counts, and lmms-eval's own run of it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from PIL import Image

from libmoe_fast import CheckpointError, ConfigError, load_model, moe_layers, record_routing, save_model
from libmoe_fast.analysis import RoutingCounts
from libmoe_fast.analysis.choices import read_choices
from libmoe_fast.analysis.report import make_report
from libmoe_fast.analysis.results import checkpoints_of, evaluation_folder
from libmoe_fast.analysis.routing_figures import changed_choices
from libmoe_fast.analysis.runs import find_runs
from libmoe_fast.evaluate import EvaluateConfig, evaluate
from libmoe_fast.lmms import LibMoEFast
from libmoe_fast.lmms_requests import cut, filled, generation_options

TOKENS = {"vision": 17, "projector": 16}  # 32 x 32 pixels in patches of 8, and CLIP's class token, which is dropped
TOP_K = 2
LAYERS = 4 + 1  # vision, projector


@pytest.fixture
def plugin(checkpoints, tmp_path):
    def make(**options):
        return LibMoEFast(str(checkpoints / "smoe" / "final"), record=str(tmp_path / "routing.json"), **options)

    return make


@pytest.fixture(scope="module")
def documents(digits):
    """Questions with images of several shapes and without any, in several lengths."""
    records = json.loads(digits.test.read_text())[:4]
    docs = [
        {"image": digits.images / record["image"], "question": question, "category": record["category"]}
        for record, question in zip(records, ["What digit is this?", "Odd?", "Is it " * 5 + "even?", "3"], strict=True)
    ]
    return [*docs, {"image": None, "question": "No image: odd or even?", "category": "text"}]


def messages(doc, **_):
    image = [] if doc["image"] is None else [{"type": "image", "url": Image.open(doc["image"])}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": doc["question"]}]}]


def requests(model, docs, *, settings=None, doc_to_messages=messages, metadata=None):
    model.task_dict["mine"] = {"test": docs}
    settings = settings or {"max_new_tokens": 6}
    arguments = [(doc["question"], doc_to_messages, settings, i, "mine", "test") for i, doc in enumerate(docs)]
    return [instance("generate_until", args, **(metadata or {})) for args in arguments]


def instance(kind, arguments, **metadata):
    *_, doc_id, task, _ = arguments
    return Instance(kind, arguments, 0, {"task": task, "doc_id": doc_id, "repeats": 1, **metadata})


def pixel_values(model, doc):
    return model._processor.image_processor(images=Image.open(doc["image"]), return_tensors="pt")["pixel_values"]


def counted(model):
    task = model.counts.tasks.get("mine")
    return None if task is None else task.total.counts


def test_lmms_eval_finds_the_plugin_by_name():
    from lmms_eval.models import get_model

    assert get_model("libmoe_fast") is LibMoEFast


def test_every_image_token_counts_top_k_times(plugin, documents):
    model = plugin(batch_size=2)
    model.generate_until(requests(model, documents))
    images = sum(doc["image"] is not None for doc in documents)
    totals = [int(counts.sum()) for counts in counted(model)]
    assert totals == [images * TOKENS["vision"] * TOP_K] * 4 + [images * TOKENS["projector"] * TOP_K]


def test_counts_are_those_of_the_routing_itself(plugin, documents, checkpoints):
    """One image at a time, straight through the vision tower, without prompts, batches or padding."""
    model = plugin(batch_size=5)
    model.generate_until(requests(model, documents))
    alone = load_model(checkpoints / "smoe" / "final")
    expected = {name: np.zeros(4, dtype=int) for name in moe_layers(alone)}
    for doc in documents[:4]:
        pixels = pixel_values(model, doc)
        with record_routing(alone) as recorder, torch.no_grad():
            alone.model.get_image_features(pixels)
        for name, (routing,) in recorder.records.items():
            for expert in routing.index.flatten().tolist():
                expected[name][expert] += 1
    assert len(expected) == LAYERS
    for name, counts in zip(model.counts.layers, counted(model), strict=True):
        assert counts.tolist() == expected[name].tolist(), name


def test_counts_by_category_add_up_to_the_task(plugin, documents):
    model = plugin(batch_size=3)
    model.generate_until(requests(model, documents))
    task = model.counts.tasks["mine"]
    categories = task.categories["category"]
    assert set(categories) == {doc["category"] for doc in documents[:4]}  # the text-only one has no image to count
    for layer in range(LAYERS):
        assert sum(c.counts[layer] for c in categories.values()).tolist() == task.total.counts[layer].tolist()


@pytest.mark.parametrize("batch_size", [2, 5])  # 2: batches of mixed lengths; 5: text-only beside images
def test_answers_do_not_depend_on_the_batch(plugin, documents, batch_size):
    one_by_one, batched = plugin(batch_size=1), plugin(batch_size=batch_size)
    expected = one_by_one.generate_until(requests(one_by_one, documents))
    assert batched.generate_until(requests(batched, documents)) == expected
    assert len(set(expected)) > 1  # untrained, but the answers do follow the questions
    for alone, together in zip(counted(one_by_one), counted(batched), strict=True):
        assert alone.tolist() == together.tolist()


def test_text_only_requests_are_answered_and_count_nothing(plugin, documents):
    model = plugin(batch_size=2)
    answers = model.generate_until(requests(model, [documents[4]] * 2))
    assert answers[0] == answers[1] != ""
    assert counted(model) is None


def test_an_image_token_in_a_question_is_no_image(plugin, documents):
    model = plugin()
    plain, tagged = ({**documents[0], "question": q} for q in ("What digit?", "What<image> digit?"))
    answers = model.generate_until(requests(model, [plain, tagged]))
    assert answers[0] == answers[1] != ""


def test_plain_prompts_are_what_the_processor_makes_of_them(plugin, documents):
    model = plugin()
    prompts = [model._render(messages(doc)) for doc in documents]
    ours = model._inputs(prompts)
    theirs = model._processor(
        text=[prompt.text for prompt in prompts],
        images=[image for prompt in prompts for image in prompt.images],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("<s>user: \u2003\ue0000\ue000\u2003</s>", "<s>user:  a b </s>"),  # the template keeps what it is given
        ("<s>user: \ue0000\ue000</s>", "<s>user: a b</s>"),  # or strips it
    ],
)
def test_contents_are_found_in_any_template(frame, expected):
    text, ((start, stop),) = filled(frame, [" a b "])
    assert (text, text[start:stop].strip()) == (expected, "a b")


def test_padding_requests_count_nothing(plugin, documents):
    model = plugin(batch_size=2)
    real = requests(model, documents[:2])
    padding = requests(model, documents[:2], metadata={"__padding_only__": True})
    answers = model.generate_until([*real, *padding[1:]])
    assert len(answers) == 3
    assert counted(model)[0].sum() == 2 * TOKENS["vision"] * TOP_K


def test_beams_do_not_count_an_image_twice(plugin, documents):
    greedy, beams = plugin(batch_size=2), plugin(batch_size=2)
    greedy.generate_until(requests(greedy, documents[:2]))
    beams.generate_until(requests(beams, documents[:2], settings={"max_new_tokens": 3, "num_beams": 3}))
    for one, many in zip(counted(greedy), counted(beams), strict=True):
        assert one.tolist() == many.tolist()


def test_loglikelihood_is_the_mean_loss_of_the_continuation(plugin, documents, checkpoints):
    model = plugin()
    model.task_dict["mine"] = {"test": documents}

    def score(continuation):
        args = ("What digit is this?", continuation, lambda doc: [Image.open(doc["image"])], 0, "mine", "test")
        return model.loglikelihood([instance("loglikelihood", args)])[0]

    # By hand: the tokens one after the other, each from a forward pass over all before it.
    alone, tokenizer = load_model(checkpoints / "smoe" / "final"), model._tokenizer
    text = f"<s><|user|>\n{'<image>' * 16}\nWhat digit is this?<|end|>\n<|assistant|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pixels = pixel_values(model, documents[0])
    losses = []
    for token in tokenizer("odd 7", add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = alone(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[token]))
        ids.append(token)
    assert len(losses) >= 2
    assert score("odd 7")[0] == pytest.approx(sum(losses) / len(losses), abs=1e-4)

    seven = tokenizer.convert_tokens_to_ids("7")
    bonus = torch.zeros(len(tokenizer)).index_fill_(0, torch.tensor([seven]), 1000.0)
    model._model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bonus)  # says 7 to everything
    assert [score(text)[1] for text in ("7", "77", "8", "78")] == [True, True, False, False]


def test_multi_round_feeds_answers_back_until_the_task_ends_it(plugin, documents):
    """A task of three rounds whose questions quote the answers so far, beside one that ends after its first."""
    seen = []

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages(doc)
        seen.append((doc["question"], round_idx, list(previous_output), previous_round_info))
        if doc["question"] == documents[1]["question"] or round_idx == 3:
            return None, True, previous_output, previous_round_info
        return messages({**doc, "question": previous_output[-1]}), False, previous_output, f"round {round_idx}"

    model = plugin(batch_size=2)
    answers = model.generate_until_multi_round(requests(model, documents[:2], doc_to_messages=rounds))
    assert [len(a) for a in answers] == [3, 1]
    first = documents[0]["question"]
    assert [(i, o, info) for q, i, o, info in seen if q == first] == [
        (1, answers[0][:1], None),
        (2, answers[0][:2], "round 1"),
        (3, answers[0], "round 2"),
    ]


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (None, "one\ntwo. three"),
        ("\n", "one"),
        (["four", ". ", "three"], "one\ntwo"),  # the first in the text, not the first in the list
        ([""], "one\ntwo. three"),  # an empty stop string stops nothing
    ],
)
def test_until_cuts_the_answer(until, expected):
    assert cut("one\ntwo. three", until) == expected


def test_generation_settings_of_tasks():
    greedy = generation_options({"temperature": 0, "until": ["x"], "image_aspect_ratio": "pad"}, 9)
    assert greedy == {"max_new_tokens": 9, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    asked = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 4, "num_beams": 2}
    assert generation_options(asked, 9) == {**asked, "do_sample": True, "top_k": None}
    assert not generation_options({"temperature": 0.7, "do_sample": False}, 9)["do_sample"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "fp7"}, "unknown dtype 'fp7'"),
        ({"image_aspect": "square"}, "image_aspect is 'square'"),
        ({"pretraind": "x"}, "unknown model argument 'pretraind'"),
    ],
)
def test_wrong_model_arguments_are_refused(plugin, options, message):
    with pytest.raises(ConfigError, match=message):
        plugin(**options)


def test_a_prompt_over_the_context_is_warned_of(plugin, documents):
    """512 positions in the tiny model: what lies beyond was never trained."""
    model = plugin()
    long = {**documents[0], "question": "Is it even? " * 200}
    with pytest.warns(UserWarning, match=r"more than the model's 512 positions"):
        model.generate_until(requests(model, [long], settings={"max_new_tokens": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate_until(requests(model, documents[:1], settings={"max_new_tokens": 1}))


def test_video_is_refused(plugin, documents):
    def video(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    model = plugin()
    with pytest.raises(ConfigError, match="video or audio"):
        model.generate_until(requests(model, documents[:1], doc_to_messages=video))


def test_a_foreign_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        LibMoEFast(str(tmp_path))


def test_a_checkpoint_without_its_processor_is_refused(checkpoints, tmp_path):
    for name in ("config.json", "libmoe_fast.json", "libmoe_fast.safetensors"):
        (tmp_path / name).symlink_to(checkpoints / "smoe" / "final" / name)
    with pytest.raises(CheckpointError, match="no processor"):
        LibMoEFast(str(tmp_path))


def test_only_one_batch_of_images_is_in_memory(plugin, documents):
    """A benchmark's images together would not fit: each is opened when its batch comes."""
    opened, answered = [], []

    def lazily(doc):
        opened.append(doc["question"])
        return messages(doc)

    model = plugin(batch_size=2)
    generate = model._generate

    def watched(prompts, settings):
        answered.append(len(opened))
        return generate(prompts, settings)

    model._generate = watched
    model.generate_until(requests(model, documents, doc_to_messages=lazily))
    assert answered == [2, 4, 5]


QUESTIONS = {
    "plain": "What digit?",
    "control-tokens": "Is <|end|>, <s> or <|assistant|> in it? ",  # Phi-3's <|end|> would take the blank after it along
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("aspect", ["pad", "none"])
def test_it_asks_as_training_taught(plugin, tmp_path, aspect, question):
    """Tokens and pixels of a question are those that training saw before the answer; the image is not square."""
    from libmoe_fast.train.config import DataConfig
    from libmoe_fast.train.data import ConversationDataset

    noise = np.random.RandomState(0).randint(0, 255, (20, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    question = question.strip()  # as a record's is
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "7"}]
    (tmp_path / "one.json").write_text(json.dumps([{"id": "1", "image": "wide.png", "conversations": turns}]))
    model = plugin(image_aspect=aspect)
    config = DataConfig(file=str(tmp_path / "one.json"), image_aspect=aspect)
    sample = ConversationDataset(config, model._processor, image_tokens=16, template="phi3")[0]
    answer = next(i for i, label in enumerate(sample.labels) if label != -100)

    prompt = model._render(messages({"image": tmp_path / "wide.png", "question": question}))
    asked = model._inputs([prompt])
    assert asked["input_ids"][0].tolist() == sample.ids[:answer]
    torch.testing.assert_close(asked["pixel_values"][0], sample.pixels)


# ---- the whole way, through lmms-eval


@pytest.fixture(scope="module")
def evaluated(checkpoints, digits, tmp_path_factory):
    """Folder of an evaluation of all 9 held-out digits, both questions."""
    out = tmp_path_factory.mktemp("eval")
    config = EvaluateConfig(tasks=["digit", "parity"], include_path=[str(digits.tasks)], batch_size=4, out=str(out))
    evaluate(checkpoints / "smoe" / "final", config)
    return out


def test_scores_are_those_of_the_written_answers(evaluated, digits):
    truth = {r["id"]: r["conversations"][1]["value"] for r in json.loads(digits.test.read_text())}
    results = json.loads((evaluated / "results.json").read_text())
    for column, task in (("digit", "digits_digit"), ("parity", "digits_parity")):
        lines = (evaluated / "samples" / f"{task}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert {s["doc"]["id"] for s in samples} == {i for i in truth if i.endswith(column)}
        right = [s["filtered_resps"][0].strip() == truth[s["doc"]["id"]] for s in samples]
        assert results["scores"][column] == pytest.approx(100 * sum(right) / 9)
        assert results["questions"][task] == 9


def test_evaluation_counts_each_task_and_each_digit(evaluated, digits):
    counts = RoutingCounts.load(evaluated / "routing.json")
    records = json.loads(digits.test.read_text())
    for task in ("digits_digit", "digits_parity"):
        assert counts.tasks[task].total.images == 9
        assert [int(c.sum()) for c in counts.tasks[task].total.counts] == [9 * 17 * 2] * 4 + [9 * 16 * 2]
        seen = {value: tally.images for value, tally in counts.tasks[task].categories["category"].items()}
        asked = [r["category"] for r in records if r["id"].endswith("digit")]
        assert seen == {digit: asked.count(digit) for digit in set(asked)}


def test_choices_are_kept_on_request_and_compared(checkpoints, digits, tmp_path):
    """Of a run with one export, one of whose gates is another one in the end: only that, and what it feeds, changes."""
    run = tmp_path / "run"
    model, processor = load_model(checkpoints / "smoe" / "final"), checkpoints / "smoe" / "final"
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(processor)
    save_model(model, run / "exports" / "step-5", processor=processor)
    layers = moe_layers(model)
    last = [name for name in layers if "vision" in name][-2]  # the projector does not read what the last one makes
    layers[last].router.weight.data.neg_()
    save_model(model, run / "final", processor=processor)
    (run / "config.yaml").touch()
    (run / "log.jsonl").write_text(json.dumps({"step": 10, "total_steps": 10, "loss": 1.0}) + "\n")
    config = EvaluateConfig(tasks=["digit"], include_path=[str(digits.tasks)], limit=3)
    for checkpoint in checkpoints_of(run):
        evaluate(checkpoint, config)
        assert not read_choices(evaluation_folder(checkpoint))  # not asked for
        evaluate(checkpoint, dataclasses.replace(config, record_choices=True))
        kept = read_choices(evaluation_folder(checkpoint))
        counts = RoutingCounts.load(evaluation_folder(checkpoint) / "routing.json").tasks["digits_digit"].total.counts
        for i, layer in enumerate(counts):
            chosen = np.concatenate([choices[i].ravel() for choices in kept.values()])
            assert np.bincount(chosen, minlength=4).tolist() == layer.tolist()
    (found,) = find_runs(run)
    ((since, share, slots, sets),) = changed_choices(found)["digits_digit"]
    changed = dict(zip(layers, slots, strict=True))
    assert (since, share) == (0.5, 1.0)
    assert changed[last] > 0.3
    assert all(value == 0 for name, value in changed.items() if list(layers).index(name) < list(layers).index(last))
    assert (sets <= slots + 1e-12).all()
    make_report(run)
    assert re.search(r"\| run +\| digits_digit +\| 50 to 100% +\|", (run / "report.md").read_text())
    assert (run / "changes.png").exists()


def test_a_second_evaluation_adds_its_tasks(checkpoints, digits, tmp_path):
    config = {"include_path": [str(digits.tasks)], "out": str(tmp_path), "limit": 2}
    for task in ("digit", "parity"):
        evaluate(checkpoints / "smoe" / "final", EvaluateConfig(tasks=[task], **config))
    assert set(json.loads((tmp_path / "results.json").read_text())["scores"]) == {"digit", "parity"}
    assert set(RoutingCounts.load(tmp_path / "routing.json").tasks) == {"digits_digit", "digits_parity"}
    evaluate(checkpoints / "dense" / "final", EvaluateConfig(tasks=["digit"], **config))
    # Another checkpoint: nothing of the first may stay.
    assert set(json.loads((tmp_path / "results.json").read_text())["scores"]) == {"digit"}


def test_two_ranks_give_what_one_gives(evaluated, checkpoints, digits, tmp_path):
    """9 questions on 2 ranks: the second answers 4 and a padding request, which must change nothing."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "libmoe_fast.cli", "evaluate", str(checkpoints / "smoe" / "final"), "--out", str(tmp_path)),
        *("--tasks", "digit", "parity", "--include_path", str(digits.tasks)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    for file, key in (("results.json", "scores"), ("routing.json", "tasks")):
        one, two = (json.loads((folder / file).read_text()) for folder in (evaluated, tmp_path))
        assert two[key] == one[key]
