"""COOKBOOK.md: every page runs as it stands there, in a folder that holds the models it names, tiny ones."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import libmoe_fast
from libmoe_fast import experts, routers
from libmoe_fast.train.tiny import tiny_llava

TEXT = (Path(__file__).parents[1] / "COOKBOOK.md").read_text()
PAGES = {
    title: re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for title, page in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)
}
NEEDS = {
    "LoRA on the experts": "peft",
    "Models that do not fit: accelerate": "accelerate",
    "A language model in 8 or 4 bits": "bitsandbytes",
    "LLaVA of Hugging Face, in the Trainer": "accelerate",
}
MIXTRAL = "Mixture-of-Experts models of Hugging Face"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """my/dense-llava, my/moe-llava and my/mixtral."""
    folder = tmp_path_factory.mktemp("cookbook")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = tiny_llava("clip", dim=16, vision_layers=4, text_layers=2)
        model.save_pretrained(folder / "my" / "dense-llava")
        libmoe_fast.save_model(libmoe_fast.upcycle(model, num_experts=4, top_k=2), folder / "my" / "moe-llava")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
        config = transformers.MixtralConfig(**sizes, **heads)
        transformers.MixtralForCausalLM(config).save_pretrained(folder / "my" / "mixtral")
    return folder, processor


class Fork(nn.Module):
    """A model in the original LLaVA's structure, as `llava.model` has it: the tower comes with load_model."""

    class CLIPVisionTower(nn.Module):
        def load_model(self):
            torch.manual_seed(1)
            self.vision_tower = tiny_llava("clip", dim=16, vision_layers=2, text_layers=1)[0].model.vision_tower
            self.vision_tower.requires_grad_(False)

        @torch.no_grad()
        def forward(self, images):
            return self.vision_tower(images).last_hidden_state

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = self.CLIPVisionTower()
        self.model.mm_projector = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    @classmethod
    def from_pretrained(cls, name):
        assert name == "my/llava-v1.5"
        return cls()

    def get_vision_tower(self):
        return self.model.vision_tower

    def forward(self, images):
        return self.model.mm_projector(self.get_vision_tower()(images))


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """The folder to run in, and the names that a page may use. What it registers is forgotten again."""
    place, processor = folder
    (tmp_path / "my").symlink_to(place / "my")
    monkeypatch.chdir(tmp_path)
    module = ModuleType("llava.model")
    module.LlavaLlamaForCausalLM = Fork
    monkeypatch.setitem(sys.modules, "llava", ModuleType("llava"))
    monkeypatch.setitem(sys.modules, "llava.model", module)
    monkeypatch.setattr(routers, "ROUTERS", dict(routers.ROUTERS))
    monkeypatch.setattr(experts, "ADAPTERS", dict(experts.ADAPTERS))
    ids = processor.tokenizer("<image>" * 16 + " odd?", return_tensors="pt")["input_ids"]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "pixel_values": pixels, "labels": ids}
    return {"batch": batch, "dataset": [{name: value[0] for name, value in batch.items()}] * 4}


@pytest.fixture
def one_process(monkeypatch):
    """A group of this process alone, as torchrun would make it. It stays, for other files too: DeepSpeed keeps it."""
    import torch.distributed as dist

    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("title", PAGES)
def test_page(title, here, request):
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    if title == MIXTRAL and Version(transformers.__version__) < Version("5.7"):
        pytest.skip("needs transformers 5.7")
    if title.startswith(("Data-parallel", "Many experts")):
        request.getfixturevalue("one_process")
    assert PAGES[title]
    torch.manual_seed(0)
    for number, code in enumerate(PAGES[title]):
        exec(compile(code, f"COOKBOOK.md, {title}, {number + 1}", "exec"), here)


def test_the_fork_computes_the_same_again(here):
    """What the page on forks saved and loaded is one model; its tower trains, though it came frozen under no_grad."""
    exec(compile(PAGES["The original LLaVA, and its forks"][0], "COOKBOOK.md", "exec"), here)
    images = torch.randn(2, 3, 32, 32)
    first, second = here["model"].eval()(images), here["evaluated"].eval()(images)
    assert torch.equal(first, second)
    first.sum().backward()
    assert all(layer.experts.w1.grad.any() for layer in libmoe_fast.moe_layers(here["model"]).values())
