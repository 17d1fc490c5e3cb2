"""Save and load models with MoE layers: strict, atomic, with the layout's name and version stored.

A folder holds `config.json` (the dense model's), `libmoe_fast.json` (layout, version, and the configuration of every
MoE layer) and `libmoe_fast.safetensors`, above 5 GB in parts with an index. The weights are not called
model.safetensors on purpose: a stock `from_pretrained` would load that, silently drop the experts, and go on with
random MLPs. A model without MoE layers is saved the stock way.

What transformers' own `save_pretrained` wrote of a swapped model, as its Trainer does, is read as well: there the
recipe is in config.json. A model that transformers has quantised is written so by `save_model`, too: how its weights
are stored is for their quantiser to know.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from libmoe_fast.compatibility import installed_version
from libmoe_fast.errors import CheckpointError, in_one_line
from libmoe_fast.expert_parallel import gather, parallel_parameters
from libmoe_fast.experts import is_sharded, unpartitioned
from libmoe_fast.files import sync, sync_tree
from libmoe_fast.layer import MoE
from libmoe_fast.multiscale import SCALES_KEY, check_scales, use_scales
from libmoe_fast.upcycle import LAYOUT, RECIPE_KEY, VERSION, install, moe_layers, recipe

RECIPE_FILE = "libmoe_fast.json"
WEIGHTS_FILE = "libmoe_fast.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"  # where the weights are in parts, as transformers writes them
WITHOUT_KEY = "libmoe_fast_without"  # of a model's config: names of modules that do nothing in this one
FORMAT = "libmoe_fast_format"  # key of a model's config.json: how its training showed it chats and images
ALIGNMENT = 64  # bytes, as torch allocates; tensors in a safetensors file have none: slower, and rounded otherwise
DEFAULT_FORMAT = {"chat_template": "phi3", "image_aspect": "pad"}


def save_model(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    processor=None,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a model, dense or swapped, to `folder`; whatever was there is replaced only when all is on disk.

    Of a model that FSDP2, ZeRO-3 or `shard_experts` has cut all processes must call it; the first one writes.

    Args:
        processor: anything with save_pretrained, saved beside the model (a LlavaProcessor).
        state_dict: weights to save instead of the model's own (those gathered from ZeRO-3).
        max_shard_size: of a file with weights, in bytes or as "5GB"; more are split over several.
    Raises CheckpointError when the disk is full or cannot be written, and for a quantised model that is cut or whose
    weights are given; the previous content then survives.
    """
    folder = Path(folder)
    if _is_quantized(model) and (state_dict is not None or _is_cut(model)):
        raise CheckpointError(
            f"{type(model).__name__} is quantised: transformers writes such a model from its own weights, whole ones, "
            "and would leave out what other processes hold or a state_dict says; save it where no process has cut it"
        )
    layers = {} if _is_quantized(model) else moe_layers(model)
    if state_dict is None and _is_cut(model):
        state_dict = whole_state(model)
        if dist.get_rank() == 0:
            options = {"processor": processor, "max_shard_size": max_shard_size}
            save_model(model, folder, state_dict=state_dict, **options)
        dist.barrier()
        return
    if layers and state_dict is None:
        state_dict = model.state_dict()
    with replace_folder(folder) as partial:
        if layers:
            _save_swapped(model, partial, layers, state_dict, max_shard_size)
        elif hasattr(model, "save_pretrained"):
            model.save_pretrained(partial, state_dict=state_dict, max_shard_size=max_shard_size)
        else:
            save_file(_unshared(state_dict or model.state_dict()), partial / WEIGHTS_FILE)
        if processor is not None:
            processor.save_pretrained(partial)


def _is_quantized(model: nn.Module) -> bool:
    """Whether transformers has quantised it (bitsandbytes, torchao)."""
    return getattr(model, "hf_quantizer", None) is not None


def _is_cut(model: nn.Module) -> bool:
    return any(map(is_sharded, model.parameters())) or bool(parallel_parameters(model))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict in CPU memory of the first process, with all whole that FSDP2, ZeRO-3 or `shard_experts`
    has cut; empty on the other processes. All must call it.
    """
    cut_experts, state = parallel_parameters(model), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with unpartitioned([tensor]):
            whole = tensor.detach()
            if name in cut_experts:
                whole = gather(whole, cut_experts[name])
            elif hasattr(whole, "full_tensor"):
                whole = whole.full_tensor()
            if dist.get_rank() == 0:
                state[name] = whole.to("cpu", copy=True)
    return state


def _save_swapped(
    model: nn.Module, folder: Path, layers: dict[str, MoE], state_dict: dict[str, Tensor], max_shard_size: int | str
) -> None:
    for part in ("config", "generation_config"):
        if hasattr(getattr(model, part, None), "save_pretrained"):
            getattr(model, part).save_pretrained(folder)
    (folder / RECIPE_FILE).write_text(json.dumps(recipe(layers), indent=1))
    state_dict, metadata = _unshared(state_dict), {"format": "pt", "layout": LAYOUT, "version": str(VERSION)}
    for name, part in _parts(state_dict, folder, max_shard_size):
        save_file(part, folder / name, metadata=metadata)


def _parts(
    state_dict: dict[str, Tensor], folder: Path, max_shard_size: int | str
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file, tensors in it); of several files, their index is written."""
    try:
        from huggingface_hub import split_torch_state_dict_into_shards
    except ImportError:  # without transformers there are no models that large
        yield WEIGHTS_FILE, state_dict
        return
    pattern = WEIGHTS_FILE.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(state_dict, filename_pattern=pattern, max_shard_size=max_shard_size)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
    for file, names in split.filename_to_tensors.items():
        yield file, {name: state_dict[name] for name in names}


def _unshared(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, the first name of each that is tied: safetensors stores no sharing."""
    seen, result = set(), {}
    for name, tensor in state_dict.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            result[name] = tensor.detach().contiguous()
    return result


def load_model(
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    quantization_config=None,
) -> nn.Module:
    """Builds the Hugging Face model saved in `folder`, dense or swapped, and loads it strictly, in evaluation mode.

    `folder` was written by save_model, or by save_pretrained: a checkpoint of transformers' Trainer.

    dtype: of the weights; None keeps the stored one. backend: of the MoE layers, see ops. quantization_config: one of
    transformers', such as BitsAndBytesConfig, for linear layers; experts and routers stay as they are stored.
    Raises CheckpointError when the folder is no checkpoint, is truncated, or does not fit the model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json; give a folder save_model wrote")
    import transformers

    with reading(folder / "config.json"):
        config = transformers.AutoConfig.from_pretrained(folder)
        cls = getattr(transformers, (config.architectures or ["LlavaForConditionalGeneration"])[0])
    with reading(folder / "config.json"):
        scales = check_scales(getattr(config, SCALES_KEY, [1]))
        without = list(getattr(config, WITHOUT_KEY, []))
    ours = (folder / RECIPE_FILE).exists()
    if ours and quantization_config is None:
        with reading(folder / "config.json"), empty_weights():
            model = leave_out(use_scales(cls(config), scales), without)
        load_weights(model, folder, dtype=dtype, backend=backend)
    else:
        options = {} if quantization_config is None else {"quantization_config": quantization_config}
        if ours:
            layers = read_recipe(folder)["layers"]
            options |= {"config": config, "state_dict": _read_state(folder, dtype)}  # from a file of a name of our own
        else:
            found = getattr(config, RECIPE_KEY, None)
            layers = {} if found is None else check_recipe(found, folder / "config.json")["layers"]
        model = _load_stock(_changed(cls, scales, without, layers, backend), folder, dtype, **options)
        model.__class__ = cls
    if ours and (folder / "generation_config.json").is_file():
        with reading(folder / "generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Where transformers, safetensors and torch read a file: they raise errors of no common kind on a damaged one."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be loaded; it may be missing, truncated or damaged: {in_one_line(error)}"
        ) from error


def empty_weights() -> contextlib.AbstractContextManager:
    """Inside, parameters are made on the meta device: no time is spent on a random start that is overwritten.

    Where accelerate, which does that, is not installed, the time is spent.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError:
        return contextlib.nullcontext()
    return init_empty_weights()


def leave_out(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replaces modules, given by dotted names, by ones that do nothing; the model's config says so to `load_model`."""
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity())
        setattr(model.config, WITHOUT_KEY, sorted({*(getattr(model.config, WITHOUT_KEY, None) or []), name}))
    return model


def load_weights(
    model: nn.Module, folder: str | os.PathLike, *, dtype: torch.dtype | None = None, backend: str | None = None
) -> nn.Module:
    """Swaps the layers that `folder` lists into `model` (any dense model of that architecture), and loads all weights.

    Strict: CheckpointError, naming the difference, for another layout or version, missing or unexpected names,
    other shapes, or a truncated file, and for a model that is quantised. Returns `model`.
    """
    folder = Path(folder)
    if _is_quantized(model):
        raise CheckpointError(
            f"{type(model).__name__} is quantised, {folder} holds whole weights; use "
            "libmoe_fast.load_model(folder, quantization_config=...), which quantises them as it reads them"
        )
    recipe = read_recipe(folder)
    with reading(folder / RECIPE_FILE):
        layers = {name: MoE(**config, backend=backend, device="meta") for name, config in recipe["layers"].items()}
    state_dict = _read_state(folder, dtype)
    try:
        install(model, layers)
        missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=True)
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {in_one_line(error)}") from error
    for layer in layers.values():
        layer.train(model.training).share_aux_scale()
    if hasattr(model, "tie_weights"):
        model.tie_weights()
        tied = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
        missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not fit {type(model).__name__}: {_differences(missing, unexpected)}"
            f"saved with transformers {recipe.get('transformers')}, here is {installed_version('transformers')}"
        )
    return model


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX_FILE).exists():
        return [folder / WEIGHTS_FILE]
    with reading(folder / INDEX_FILE):
        index = json.loads((folder / INDEX_FILE).read_text())
        return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _read_state(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    state_dict = {}
    for path in _weight_files(folder):
        with reading(path):
            state_dict |= _read_weights(path, dtype)
    return state_dict


def _read_weights(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Each tensor in memory of its own; see ALIGNMENT."""
    with safe_open(path, "pt") as file:
        tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (not a dict)
        return {
            name: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in tensors
        }


def layer_names(folder: Path) -> list[str]:
    """The MoE layers of a checkpoint, in model order, without its weights; [] for a dense one, or none at all."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if (folder / RECIPE_FILE).exists():
            return list(read_recipe(folder)["layers"])
        found = json.loads((folder / "config.json").read_text()).get(RECIPE_KEY)
        return [] if found is None else list(check_recipe(found, folder / "config.json")["layers"])
    return []


def read_recipe(folder: Path) -> dict:
    """The layout, version and layers of a checkpoint; CheckpointError for any that this version cannot read."""
    path = folder / RECIPE_FILE
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error!r}); copy the checkpoint again") from error
    return check_recipe(found, path)


def check_recipe(found: dict, path: Path) -> dict:
    try:
        layout, version = found["layout"], found["version"]
        found["layers"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error!r}); copy the checkpoint again") from error
    if (layout, version) != (LAYOUT, VERSION):
        raise CheckpointError(
            f"{path} has layout {layout!r} version {version}; this libmoe_fast reads {LAYOUT!r} version {VERSION}. "
            "Convert it, or install the version that wrote it"
        )
    return found


def _changed(
    cls: type, scales: tuple[int, ...], without: list[str], layers: dict[str, dict], backend: str | None
) -> type:
    """`cls`, whose models are made with these scales and MoE layers, and without these modules: transformers then loads
    their weights too, renamed and gathered as it does with others. `cls` itself where nothing is changed.
    """
    if scales == (1,) and not layers and not without:
        return cls

    def init(self, config, *args, **kwargs):
        cls.__init__(self, config, *args, **kwargs)
        leave_out(use_scales(self, scales), without)
        if layers:
            install(self, {name: MoE(**layer, backend=backend) for name, layer in layers.items()})

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def _load_stock(cls: type, folder: Path, dtype: torch.dtype | None, **options) -> nn.Module:
    """options: of from_pretrained; with a state_dict nothing is read from `folder`."""
    source = None if "state_dict" in options else folder
    options |= _dtype_option(dtype or "auto")
    with reading(folder):
        model, report = cls.from_pretrained(source, **options, output_loading_info=True)
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected or report["mismatched_keys"]:
        raise CheckpointError(
            f"{folder} does not fit {cls.__name__}: {_differences(missing, unexpected)}"
            f"{_some('other shape', report['mismatched_keys'])}give a checkpoint of this architecture"
        )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    for layer in moe_layers(model).values():
        layer.share_aux_scale()
    return model.eval()


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty sibling to fill; on success it is fsynced and takes the place of `folder`, else it is removed.

    Raises CheckpointError for what the disk refuses (full, read-only); `folder` is then as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    try:
        partial.mkdir()
        yield partial
        _open_to_readers(partial)
        sync_tree(partial)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full: free some space and run again" if full else in_one_line(error)
        raise CheckpointError(f"{folder} could not be saved, the previous content survives; {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Files have the modes that the umask says; safetensors writes its own for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _dtype_option(dtype: torch.dtype | str | None) -> dict:
    """from_pretrained's argument for the dtype of the weights, which transformers 4.56 renamed."""
    renamed = Version(installed_version("transformers") or "0") >= Version("4.56")
    return {"dtype" if renamed else "torch_dtype": dtype}


def _differences(missing, unexpected) -> str:
    return _some("missing", missing) + _some("unexpected", unexpected)


def _some(what: str, names) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(map(str, names[:3]))}{more}; "
