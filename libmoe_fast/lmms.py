"""The lmms-eval model plugin: evaluates any checkpoint of ours, and counts which experts its images were sent to.

lmms-eval finds it by the entry point group `lmms_eval.models`:

    lmms-eval --model libmoe_fast --model_args pretrained=runs/smoe/final,record=routing.json --tasks mme

Importing this module needs torch and lmms-eval only; a checkpoint's code is imported when one is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lmms_eval.api.model import lmms

from libmoe_fast.analysis.ablation import drop_top1
from libmoe_fast.analysis.counts import RoutingCounts, image_layers
from libmoe_fast.checkpoint import DEFAULT_FORMAT, FORMAT, layer_names
from libmoe_fast.errors import CheckpointError, ConfigError
from libmoe_fast.lmms_requests import (
    BLANK,
    MARK,
    Rounds,
    batches,
    categories_of,
    cut,
    filled,
    generation_options,
    is_padding,
    settings_of,
)

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

    from libmoe_fast.answers import AnswerStore


def manifests() -> list[ModelManifest]:
    """What the entry point hands to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="libmoe_fast", chat_class_path=f"{__name__}.LibMoEFast")]


class AnsweredShare(Exception):
    """All questions of this process's share are answered and on disk; scoring needs the others' answers too."""


@dataclass
class Prompt:
    """One request, ready to be tokenized. contents: the spans of characters in its text that people wrote."""

    text: str
    contents: list[tuple[int, int]]
    images: list
    task: str
    categories: dict[str, str]


class LibMoEFast(lmms):
    """A chat model over a checkpoint folder, dense or swapped.

    Args:
        pretrained: folder that `libmoe_fast.save_model` (or `libmoe-fast train`) wrote, processor included.
        batch_size: requests per forward pass.
        device: `"cuda"`, `"cpu"`, ...; default: this rank's GPU if there is one.
        dtype: `"auto"` keeps the checkpoint's; or a torch dtype's name.
        backend: engine of the MoE layers; default: the best usable one.
        image_aspect: `"pad"` squares images, `"none"` leaves that to the processor; default: as the checkpoint was
            trained, else `"pad"`.
        record: file for the expert-selection counts (JSON, see `analysis.RoutingCounts`); none: not counted.
        max_new_tokens: for tasks that do not say.
        answers: where answers are kept as they come, and taken from; the model is loaded for the first that is missing.
        drop_top1: take each token's first expert away (see analysis.ablation).
        choices: also keep, with the answers, which experts each image token was sent to (see analysis.choices).
        outputs: also compare the outputs of each image token's experts (see analysis.counter).
        share: (which, of how many): answer only every so-manieth question, then raise AnsweredShare.

    Raises:
        ConfigError: an option it does not have.
        CheckpointError: `pretrained` cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int = 1,
        device: str | None = None,
        dtype: str = "auto",
        backend: str | None = None,
        image_aspect: str | None = None,
        record: str | None = None,
        max_new_tokens: int = 128,
        answers: AnswerStore | None = None,
        choices: bool = False,
        drop_top1: bool = False,
        outputs: bool = False,
        share: tuple[int, int] | None = None,
        max_batch_size: int | None = None,  # lmms-eval always passes it; it is for automatic batch sizes
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(
                f"unknown model argument {sorted(unknown)[0]!r}: libmoe_fast takes pretrained, batch_size, device, "
                "dtype, backend, image_aspect, record and max_new_tokens"
            )
        if image_aspect not in (None, "pad", "none"):
            raise ConfigError(f"image_aspect is {image_aspect!r}: expected 'pad' or 'none'")
        self._batch_size = _positive(batch_size, "batch_size")
        self._max_new_tokens = _positive(max_new_tokens, "max_new_tokens")
        self._record, self._store, self.share, self._choices = record, answers, share, choices
        self._drop_top1, self._outputs = drop_top1, outputs
        self._checkpoint = {"folder": str(pretrained), "dtype": dtype, "backend": backend}
        self._image_aspect = image_aspect
        self._join_ranks(device)
        self.counts = RoutingCounts(image_layers(layer_names(Path(pretrained))))
        self.given: list[Any] = []
        self._data = ""
        if answers is None:
            self.load()

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def device(self) -> torch.device:
        return self._device

    def _join_ranks(self, device: str | None) -> None:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device in (None, "auto", "cuda"):
            device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        if self._world_size > 1 and self._store is None and not dist.is_initialized():
            dist.init_process_group("nccl" if self._device.type == "cuda" else "gloo")

    def __getattr__(self, name: str) -> Any:
        """The model and what comes with it, when they are asked for first."""
        if name in ("_model", "_processor", "_tokenizer", "_image_tokens", "_context"):
            self.load()
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def load(self) -> None:
        """The model and its processor; raises what load_model does, and CheckpointError without a processor."""
        folder = self._checkpoint["folder"]
        from transformers import AutoProcessor

        import libmoe_fast
        from libmoe_fast.train.model import image_tokens

        dtype = _torch_dtype(self._checkpoint["dtype"])
        model = libmoe_fast.load_model(folder, dtype=dtype, backend=self._checkpoint["backend"])
        self._model = model.to(self._device).eval()
        if self._drop_top1:
            drop_top1(self._model)
        trained = DEFAULT_FORMAT | (getattr(model.config, FORMAT, None) or {})
        self._image_aspect = self._image_aspect or trained["image_aspect"]
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        try:
            self._processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} has no processor: save one beside the model (processor.save_pretrained)"
            ) from error
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"  # a generated token follows the prompt, not padding
        self._image_tokens = image_tokens(self._model)

    # ---- what lmms-eval calls

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of `requests`; batches hold requests of equal generation settings."""
        requests = self._mine(requests)
        return self._end_of_share(self._answer(requests, lambda i, doc: requests[i].args[1](doc)))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """A list of answers per request: the task writes each round's messages from the answers so far."""
        requests = self._mine(requests)
        rounds = [Rounds() for _ in requests]
        going_on = [i for i, request in enumerate(requests) if not is_padding(request)]
        while going_on:
            for i in going_on:
                rounds[i].prepare(requests[i].args[1], self._document(requests[i]))
            going_on = [i for i in going_on if rounds[i].messages is not None]
            messages = [rounds[i].messages for i in going_on]
            so_far = [list(rounds[i].answers) for i in going_on]
            asked = [requests[i] for i in going_on]
            answers = self._answer(asked, lambda j, _, given=messages: given[j], so_far)
            for i, answer in zip(going_on, answers, strict=True):
                rounds[i].answers.append(answer)
        return self._end_of_share([state.answers for state in rounds])

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(mean negative log-likelihood, greedy?) of each continuation, which is what lmms-eval takes the argmin of."""
        scored = []
        for request in self._mine(requests):
            context, continuation, *document = request.args
            visuals = []
            if document:  # absent in the unconditional requests of acc_mutual_info
                doc_to_visual, doc_id, task, split = document
                doc = self.task_dict[task][split][doc_id]
                visuals = doc_to_visual(doc) or []
                continuation = continuation if isinstance(continuation, str) else continuation(doc)
            content = [{"type": "image", "url": image} for image in visuals] + [{"type": "text", "text": context}]
            scored.append(self._score([{"role": "user", "content": content}], continuation))
        return self._end_of_share(scored)

    def clean(self) -> None:
        """lmms-eval calls this once, on every rank, when all requests are answered: the place to write the counts."""
        if self._record is not None:
            self._write_counts(self._record)
        if self._store is None:  # else further tasks come, and may need the model
            super().clean()

    # ---- what `evaluate` calls

    @property
    def store(self) -> AnswerStore | None:
        return self._store

    def begin(self, share: tuple[int, int] | None, data: str = "") -> None:
        """Before a task: its counts are its own. data: what tells its documents from others of the same name."""
        self.share, self.given, self._data = share, [], data
        self.counts = RoutingCounts(self.counts.layers)

    @property
    def loaded(self) -> bool:
        return "_model" in self.__dict__

    @property
    def module(self) -> torch.nn.Module:
        return self._model

    def digest(self) -> str:
        """Of the answers given since `begin`."""
        return hashlib.sha256(json.dumps(self.given).encode()).hexdigest()[:16]

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _mine(self, requests: list[Instance]) -> list[Instance]:
        which, of = self.share or (0, 1)
        return requests[which::of]

    def _end_of_share(self, answers: list) -> list:
        self.given += answers
        if self.share is not None:
            raise AnsweredShare(f"{len(answers)} questions answered")
        return answers

    # ---- answering

    def _document(self, request: Instance) -> Mapping:
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _prompt(self, request: Instance, messages: Callable[[Mapping], list[dict]]) -> Prompt:
        *_, task, _ = request.args
        document = self._document(request)  # once: reading it decodes its images
        return self._render(messages(document), task, categories_of(task, document))

    def _render(self, messages: list[dict], task: str = "", categories: Mapping[str, str] | None = None) -> Prompt:
        """The chat as text with one `<image>` per image, and the images, squared as they were in training."""
        from lmms_eval.protocol import ChatMessages

        chat = ChatMessages(messages=messages)
        images, videos, audios = chat.extract_media()
        if videos or audios:
            raise ConfigError(
                "the task asks about video or audio; these checkpoints read text and images: leave it out"
            )
        rendered = chat.to_hf_messages()
        parts = [part for message in rendered for part in message["content"] if part["type"] == "text"]
        written = [part["text"].replace(self._processor.image_token, "") for part in parts]  # it would be an image
        for number, part in enumerate(parts):
            part["text"] = f"{BLANK}{MARK}{number}{MARK}{BLANK}"
        frame = self._processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        text, contents = filled(frame, written)
        return Prompt(text, contents, [self._prepared(image) for image in images], task, dict(categories or {}))

    def _prepared(self, image: Any):
        from libmoe_fast.train.images import prepare_image

        return prepare_image(image, self._processor.image_processor, self._image_aspect)

    def _inputs(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        from libmoe_fast.train.chat import encode_prompt

        rows = [
            encode_prompt(prompt.text, prompt.contents, self._tokenizer, image_tokens=self._image_tokens)
            for prompt in prompts
        ]
        encoded = self._tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt").to(self._device)
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            pixels = self._processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            encoded["pixel_values"] = pixels.to(self._device, self._model.dtype)
        return dict(encoded)

    def _answer(
        self,
        requests: list[Instance],
        messages: Callable[[int, Mapping], list[dict]],
        so_far: Sequence[Any] | None = None,
    ) -> list[str]:
        """Answers in the order of `requests`; only one batch of images is in memory at a time.

        Args:
            messages: from a request's position and its document to its chat.
            so_far: what else a request's answer depends on, for the store.
        """
        from tqdm import tqdm

        lines: dict[int, dict[str, Any]] = {}
        keys = {}
        if self._store is not None:
            keys = {i: self._key(r, so_far and so_far[i]) for i, r in enumerate(requests) if not is_padding(r)}
            stored = {i: self._store.get(key) for i, key in keys.items()}
            lines = {i: line for i, line in stored.items() if line is not None and self._says_enough(line)}
        missing = [i for i, request in enumerate(requests) if i not in lines and not is_padding(request)]
        description = f"Answering {requests[0].task_name}" if requests and requests[0].task_name else "Answering"
        with tqdm(total=len(requests), desc=description, disable=self.rank != 0 or not requests) as bar:
            bar.update(len(lines))
            for indices in batches(requests, self._batch_size, missing):
                prompts = [self._prompt(requests[i], partial(messages, i)) for i in indices]
                for i, line in zip(indices, self._generate(prompts, settings_of(requests[indices[0]])), strict=True):
                    lines[i] = line
                    if self._store is not None:
                        line["document"] = requests[i].args[-3]
                        self._store.add(requests[i].args[-2], keys[i], line)
                bar.update(len(indices))
        for i, line in sorted(lines.items()):
            if line["images"] and self.counts.layers:
                self.counts.add(
                    requests[i].args[-2], line["categories"], line["counts"], line["gates"], images=line["images"]
                )
        # A padding request keeps an empty answer: no rank waits for another inside a batch.
        return [lines[i]["answer"] if i in lines else "" for i in range(len(requests))]

    def _says_enough(self, line: Mapping[str, Any]) -> bool:
        asked = [name for name, wanted in (("choices", self._choices), ("outputs", self._outputs)) if wanted]
        return not line["images"] or all(name in line for name in asked)

    def _key(self, request: Instance, so_far: Any) -> str:
        context, *_, doc_id, task, split = request.args
        data = [self._data, getattr(self.task_dict[task][split], "_fingerprint", None)]
        return self._store.key(task, split, doc_id, context, settings_of(request), request.idx, data, so_far)

    @torch.inference_mode()
    def _generate(self, prompts: list[Prompt], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Of each prompt: the answer, its categories, and where its images' tokens went (see AnswerStore)."""
        from libmoe_fast.analysis.choices import pack
        from libmoe_fast.analysis.counter import record_images

        options = generation_options(settings, self._max_new_tokens)
        inputs = self._inputs(prompts)
        self._check_length(inputs["input_ids"].shape[1], options["max_new_tokens"])
        images = sum(len(prompt.images) for prompt in prompts) if self._counting else 0
        beams = options.get("num_beams", 1)
        with record_images(self._model, images, beams=beams, outputs=self._outputs) as seen:
            output = self._model.generate(**inputs, **options, pad_token_id=self._tokenizer.pad_token_id)
        new = output[:, inputs["input_ids"].shape[1] :]  # [B, new tokens]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        records = iter(seen)
        lines = []
        for prompt, text in zip(prompts, texts, strict=True):
            line = {"answer": cut(text, settings.get("until")), "categories": prompt.categories, "images": 0}
            if own := list(islice(records, len(prompt.images))):
                record = reduce(add, own)
                line |= {
                    "images": len(own),
                    "counts": [counts.tolist() for counts in record.counts],
                    "gates": [[round(value, 5) for value in gates.tolist()] for gates in record.gates],
                }
                if self._outputs:
                    line["outputs"] = "compared"
                if self._choices:
                    # One number more than there are counts, for a choice that is nobody's.
                    sizes = [max(len(n), int(c.max()) + 1) for n, c in zip(record.counts, record.chosen, strict=True)]
                    line["choices"] = pack(record.chosen, sizes)
            lines.append(line)
        return lines

    @property
    def _counting(self) -> bool:
        return bool(self.counts.layers) and (self._record is not None or self._store is not None)

    def _check_length(self, prompt: int, new: int) -> None:
        if self._context is not None and prompt + new > self._context:
            warnings.warn(
                f"a prompt of {prompt} tokens and {new} to answer are more than the model's {self._context} positions: "
                "what lies beyond was never trained, and answers there mean little",
                stacklevel=2,
            )

    @torch.inference_mode()
    def _score(self, messages: list[dict], continuation: str) -> tuple[float, bool]:
        asked = self._render(messages)
        whole = asked.text + continuation
        answered = replace(asked, text=whole, contents=[*asked.contents, (len(asked.text), len(whole))])
        prompt = self._inputs([asked])["input_ids"][0]
        inputs = self._inputs([answered])
        ids = inputs["input_ids"][0]
        shared = min(len(prompt), len(ids))
        differs = (prompt[:shared] != ids[:shared]).nonzero()
        start = int(differs[0]) if len(differs) else shared  # earlier than the prompt's end where tokens merge over it
        if start == len(ids):
            raise ConfigError(f"the continuation {continuation!r} has no token to score: give a longer one")
        logits = self._model(**inputs, logits_to_keep=len(ids) - start + 1).logits[0, :-1].float()  # [C, V]
        target = ids[start:]
        loss = torch.nn.functional.cross_entropy(logits, target)
        return loss.item(), bool((logits.argmax(-1) == target).all())

    # ---- counting

    def _write_counts(self, path: str) -> None:
        counts = self.counts
        if self._world_size > 1:
            gathered: list[RoutingCounts | None] = [None] * self._world_size
            dist.all_gather_object(gathered, counts)
            counts = gathered[0]
            for other in gathered[1:]:
                counts.merge(other)
        if self._rank == 0:
            counts.save(path)


def _torch_dtype(name: str) -> torch.dtype | None:
    if name in (None, "auto"):
        return None
    dtype = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"unknown dtype {name!r}: expected auto, bf16, fp16 or fp32")
    return dtype


def _positive(value: Any, name: str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ConfigError(f"{name} is {value!r}: expected a whole number of at least 1")
    return int(value)
