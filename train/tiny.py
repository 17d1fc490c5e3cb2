"""A whole LLaVA that fits in a test: vision tower, projector, Phi-3 and its processor, from configs and a seed alone.

Nothing is downloaded. The classes are the ones the real pipeline runs, so whatever works here (swapping, training,
saving, generating) works on CLIP-L + Phi-3-mini; only the sizes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from libmoe_fast.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<image>")

# Phi-3's format: no system turn unless one is given; every turn ends in <|end|>, which is also the end of generation.
PHI3_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_HEADS = 4
_MAX_POSITIONS = 512


def tiny_llava(
    kind: Literal["clip", "siglip"] = "clip",
    *,
    image_size: int = 32,
    patch_size: int = 8,
    dim: int = 64,
    vision_layers: int = 4,
    text_layers: int = 2,
    vocab_texts: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a LLaVA with random weights, and its processor.

    Args:
        kind: vision tower, `"clip"` (class token, dropped before the projector) or `"siglip"` (no class token).
        image_size, patch_size: pixels; an image becomes `(image_size / patch_size) ** 2` tokens.
        dim: width of both towers, a multiple of 4 (the number of heads); every MLP is 4 times as wide.
        vocab_texts: the tokenizer is trained on these. Any other text still encodes, byte by byte.
        seed: draws every weight. The global random state is left as it was.

    Raises:
        ConfigError: an unknown kind, or sizes that do not divide.
    """
    if kind not in ("clip", "siglip"):
        raise ConfigError(f"unknown vision tower {kind!r}: expected 'clip' or 'siglip'")
    if image_size % patch_size:
        raise ConfigError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: choose one that is")
    if dim % _HEADS:
        raise ConfigError(f"dim {dim} is not a multiple of the {_HEADS} attention heads: choose one that is")
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Phi3Config

    tokenizer = tiny_tokenizer(vocab_texts or ())
    text_config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=text_layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=_MAX_POSITIONS,
        original_max_position_embeddings=_MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    select_strategy = "default" if kind == "clip" else "full"
    config = LlavaConfig(
        vision_config=_vision_config(kind, image_size, patch_size, dim, vision_layers),
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=select_strategy,
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    processor = LlavaProcessor(
        image_processor=_image_processor(kind, image_size),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select_strategy,
        num_additional_image_tokens=1 if kind == "clip" else 0,
        image_token="<image>",
        chat_template=PHI3_CHAT_TEMPLATE,
    )
    return model, processor


def tiny_tokenizer(texts: Sequence[str], *, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Phi-3's special tokens, trained on `texts`; at most `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>", "<image>"],
        chat_template=PHI3_CHAT_TEMPLATE,
    )


def _vision_config(kind: str, image_size: int, patch_size: int, dim: int, layers: int):
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    sizes = {
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if kind == "clip":
        return CLIPVisionConfig(projection_dim=dim, **sizes)
    return SiglipVisionConfig(vision_use_head=False, **sizes)


def _image_processor(kind: str, image_size: int):
    """The PIL variant: transformers 5 made the plain name need torchvision, which a CPU install has not."""
    import transformers

    square = {"height": image_size, "width": image_size}
    if kind == "clip":
        cls = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        return cls(size={"shortest_edge": image_size}, crop_size=square)
    cls = getattr(transformers, "SiglipImageProcessorPil", transformers.SiglipImageProcessor)
    return cls(size=square)
