"""The scale of the auxiliary losses: in every form of a loss, and in training loops that know nothing of them."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from libmoe_fast import MoE, loss_scale, moe_layers, scale_aux_loss, upcycle
from libmoe_fast.train.tiny import tiny_llava

LABELS = torch.tensor([1, -100, 3, 0, -100, 2, 2])  # 5 that count
BATCHES = 40  # labels of all accumulated batches


@pytest.fixture(scope="module", autouse=True)
def layer():
    """Somewhere in the process is a layer, which holds the scalar."""
    return MoE(2, 2, 2, num_experts=2, top_k=1, router="smoe", router_options={"normalize": "none"})


def cross_entropy(logits, **options):
    return F.cross_entropy(logits, LABELS, **options)


def one_by_one(logits):
    return cross_entropy(logits, reduction="none")


def smoothed(logits, count):
    """transformers' LabelSmoother, which divides by the labels it is told of."""
    log_probs, padding = -F.log_softmax(logits, -1), LABELS.eq(-100)[:, None]
    nll = log_probs.gather(-1, LABELS.clamp(min=0)[:, None]).masked_fill(padding, 0.0)
    uniform = log_probs.sum(-1, keepdim=True).masked_fill(padding, 0.0)
    return 0.9 * nll.sum() / count + 0.1 * uniform.sum() / (count * logits.shape[-1])


class LogProbs(torch.autograd.Function):
    """A fused head's: log p of each label, and nothing to see inside."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return F.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        return grad[:, None] * (F.one_hot(labels, logits.shape[-1]) - F.softmax(logits, -1)), None


def log_probs(logits):
    return LogProbs.apply(logits, LABELS.clamp(min=0))


def scattered(logits):
    """As TRL's trainers do on a GPU: only what has a label is computed."""
    there = LABELS.ne(-100)
    return logits.new_zeros(len(LABELS)).masked_scatter(there, LogProbs.apply(logits[there], LABELS[there]))


LOSSES = {  # loss of the logits -> the scale: what the task's mean loss over the batch's labels was multiplied by
    "mean": (cross_entropy, 1),
    "accumulated": (lambda x: cross_entropy(x) / 4, 1 / 4),
    "fp16 scale": (lambda x: cross_entropy(x) / 4 * torch.tensor(1024.0), 256),
    "labels of all batches": (lambda x: cross_entropy(x, reduction="sum") / BATCHES, 5 / 40),
    "as a tensor": (lambda x: cross_entropy(x, reduction="sum") / torch.tensor(BATCHES), 5 / 40),
    "and several processes": (lambda x: cross_entropy(x, reduction="sum") / BATCHES * 2, 10 / 40),
    "own labels": (lambda x: cross_entropy(x, reduction="sum") / LABELS.ne(-100).sum(), 1),
    "one by one": (lambda x: one_by_one(x).sum() / BATCHES / 2, 5 / 80),
    "one by one, mean": (lambda x: one_by_one(x).mean() / 2, 1 / 2),
    "masked by hand": (lambda x: (one_by_one(x) * LABELS.ne(-100)).sum() / LABELS.ne(-100).sum() / 2, 1 / 2),
    "smoothed by torch": (lambda x: cross_entropy(x, label_smoothing=0.1, reduction="sum") / BATCHES, 5 / 40),
    "smoothed, own labels": (lambda x: smoothed(x, 5) / 4, 1 / 4),
    "smoothed, labels of all batches": (lambda x: smoothed(x, BATCHES), 5 / 40),
    "another loss added": (lambda x: (cross_entropy(x) + 0.3 * x.square().mean()) / 4, 1 / 4),
    "another loss added to a sum": (lambda x: cross_entropy(x, reduction="sum") / BATCHES + x.mean() * 7, 5 / 40),
    "learned weight": (lambda x: cross_entropy(x) * x[0, 0].exp() / 2, 1 / 2),
    "masked by hand, labels of all batches": (lambda x: (one_by_one(x) * LABELS.ne(-100)).sum() / BATCHES, 5 / 40),
    "a float mask": (lambda x: (-one_by_one(x) * LABELS.ne(-100).float()).sum() / BATCHES, 5 / 40),
    "blanked after all": (lambda x: -log_probs(x).masked_fill(LABELS.eq(-100), 0.0).sum() / BATCHES, 5 / 40),
    "weighted and blanked": (
        lambda x: ((p := log_probs(x).masked_fill(LABELS.eq(-100), 0.0)) * p.exp().detach()).sum() / BATCHES,
        5 / 40,
    ),
    "scattered": (lambda x: -scattered(x).sum() / torch.tensor(BATCHES), 5 / 40),
    "nothing says which": (lambda x: -log_probs(x).sum() / BATCHES, 7 / 40),
    "nothing says which, fewer": (lambda x: -log_probs(x).sum() / 5, 1),
    "squares": (lambda x: x.square().sum(), 1),
    "cast and reshaped": (lambda x: (cross_entropy(x).double().view(1) / 4).bfloat16(), 1 / 4),
    "marked": (lambda x: scale_aux_loss(cross_entropy(x) * 3) / 4, 1 / 4),
    "marked within a sum": (lambda x: (scale_aux_loss(cross_entropy(x)) / 2 + x.mean()) / 4, 1 / 8),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("grad", [False, True], ids=["backward", "grad"])
def test_every_form_of_a_loss(case, grad):
    loss, expected = LOSSES[case]
    logits = torch.randn(len(LABELS), 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if grad:
        torch.autograd.grad(loss(logits * 1), logits)
    else:
        loss(logits * 1).backward()
    scale = loss_scale.shared(torch.device("cpu"))
    torch.testing.assert_close(scale, torch.tensor(float(expected)))


def test_a_fused_loss_that_is_divided_is_warned_of():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(3)

    loss_scale._warn_once.cache_clear()
    for times in (1, 0):  # once by name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (Fused.apply(torch.ones(3, requires_grad=True)) / 40).backward()
        assert sum("FusedBackward and is divided" in str(warning.message) for warning in caught) == times


def test_no_root_no_scale():
    """The next backward starts from 1, whatever the last one's scale was."""
    (cross_entropy(torch.randn(7, 6, requires_grad=True)) / 8).backward()
    torch.ones(3, requires_grad=True).mul(2).backward(torch.ones(3))
    assert loss_scale.shared(torch.device("cpu")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Loops of other libraries

ACCUMULATION = 4


def samples(processor):
    ids = processor.tokenizer("<image>" * 16 + "What digit is it? 7<|end|>", return_tensors="pt")["input_ids"][0]
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(3, 32, 32, generator=generator)}
        for _ in range(ACCUMULATION)
    ]


def routers(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if "router" in name and parameter.grad is not None
    }


def auxiliary_gradients(make_model, data):
    """The truth: the auxiliary losses alone, added up by hand and averaged over the micro-batches."""
    model = make_model(0.5)
    layers = list(moe_layers(model).values())
    losses = {}
    for layer in layers:
        layer.aux_mode = "return"
        layer.register_forward_hook(lambda layer, _, output: (losses.update({layer: output[1]}), output[0])[1])
    for sample in data:
        model(**{name: value[None] for name, value in sample.items()})
        unused = [layer for name, layer in moe_layers(model).items() if "vision" in name][-1]  # vision_feature_layer -2
        (sum(loss for layer, loss in losses.items() if layer is not unused) / len(data)).backward()
    return routers(model)


def trainer_gradients(make_model, data, folder, wrap, **options):
    """Gradients of one optimizer step of transformers' Trainer, as the optimizer sees them."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.update(routers(model))

    compute = options.pop("compute_loss_func", None)
    found = []
    for coefficient in (0.5, 0.0):
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ACCUMULATION,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=True,  # where training in this process has left a group, Trainer takes DDP
            **options,
        )
        model = wrap(make_model(coefficient))
        Trainer(model=model, args=arguments, train_dataset=data, compute_loss_func=compute, callbacks=[Look()]).train()
        found.append({name.removeprefix("base_model.model."): grad for name, grad in seen.items()})
        seen.clear()
    return {name: grad - found[1][name] for name, grad in found[0].items()}


def with_adapters(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["qkv_proj"]))
    for layer in moe_layers(adapted).values():
        layer.requires_grad_(True)
    return adapted


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("wrap", "options", "scale"),
    [
        pytest.param(lambda model: model, {}, 1, id="accumulation"),
        # It sums the loss of all 36 labels, and divides by the 35 that a shifted sequence has.
        pytest.param(lambda model: model, {"label_smoothing_factor": 0.1}, 36 / 35, id="label-smoothing"),
        pytest.param(lambda model: model, {"compute_loss_func": summed_loss}, 1, id="compute_loss_func"),
        pytest.param(lambda model: model, {"gradient_checkpointing": True}, 1, id="checkpointing"),
        pytest.param(with_adapters, {}, 1, id="peft"),
    ],
)
def test_in_transformers_trainer(wrap, options, scale, tmp_path):
    """scale: what the Trainer multiplies the task's loss by, accumulation apart."""
    dense, processor = tiny_llava(dim=16, vision_layers=2, text_layers=1)
    data = samples(processor)

    def make_model(coefficient):
        torch.manual_seed(0)
        return upcycle(copy.deepcopy(dense), balance_coef=coefficient, z_coef=coefficient / 5).train()

    expected = auxiliary_gradients(make_model, data)
    actual = trainer_gradients(make_model, data, tmp_path, wrap, **options)
    assert expected.keys() == actual.keys()
    for name, grad in expected.items():
        grad = grad * scale
        torch.testing.assert_close(actual[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("unused", [False, True], ids=["ddp", "ddp-unused"])
def test_through_distributed_data_parallel(unused):
    """With find_unused_parameters, the outputs of a model pass a node that hands all of them through."""
    import torch.distributed as dist

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 6)

        def forward(self, x):
            logits = self.layer(x)
            return {"logits": logits, "loss": cross_entropy(logits, reduction="sum") / BATCHES}

    # Training in this process, in another file, leaves its own group, which DeepSpeed keeps.
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=unused)
        (model(torch.randn(7, 3))["loss"] * 2).backward()
    finally:
        if ours:
            dist.destroy_process_group()
    torch.testing.assert_close(loss_scale.shared(torch.device("cpu")), torch.tensor(10 / 40))
