"""libmoe_fast: fast Mixture-of-Experts layers to swap into an existing LLaVA (LibMoE, arXiv 2411.00918)."""

from pathlib import Path

# In a checkout, kernels/, train/ and benchmarks/ lie beside this folder: so they are found without an installation,
# with nothing but PYTHONPATH. An installed package has them inside (setup.py).
if (Path(__file__).parents[1] / "setup.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))

from libmoe_fast.checkpoint import load_model, load_weights, save_model
from libmoe_fast.errors import BackendError, CheckpointError, ConfigError, DataError, LibMoEError
from libmoe_fast.expert_parallel import shard_experts
from libmoe_fast.experts import DenseParts, Experts, register_mlp
from libmoe_fast.huggingface import register_transformers
from libmoe_fast.layer import MoE
from libmoe_fast.multiscale import use_scales
from libmoe_fast.ops import available_backends
from libmoe_fast.routers import ROUTERS, Router, build_router, register_router
from libmoe_fast.routers_v2 import SharedExpertRouter
from libmoe_fast.spec import RouterSpec, Routing
from libmoe_fast.upcycle import (
    RoutingRecorder,
    aux_loss_disabled,
    moe_layers,
    record_routing,
    scale_aux_loss,
    set_training_progress,
    upcycle,
)

__version__ = "0.1.0"

__all__ = [
    "ROUTERS",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DenseParts",
    "Experts",
    "LibMoEError",
    "MoE",
    "Router",
    "RouterSpec",
    "Routing",
    "RoutingRecorder",
    "SharedExpertRouter",
    "aux_loss_disabled",
    "available_backends",
    "build_router",
    "load_model",
    "load_weights",
    "moe_layers",
    "record_routing",
    "register_mlp",
    "register_router",
    "register_transformers",
    "save_model",
    "scale_aux_loss",
    "set_training_progress",
    "shard_experts",
    "upcycle",
    "use_scales",
]
