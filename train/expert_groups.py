"""Expert parallelism under DeepSpeed: its expert groups, around our experts.

DeepSpeed knows a parameter of experts by two attributes: it is averaged over the processes that hold the same experts
only, and has its optimizer state sharded among those. That there are such parameters, its engine sees by modules of
its own class, for which a marker without parameters stands in.
"""

from typing import Any

import torch.distributed as dist
from torch import nn

from libmoe_fast.errors import ConfigError
from libmoe_fast.expert_parallel import parallel_parameters, shard_experts

MARKER = "expert_parallel"  # the marker's name in the model


def check_groups(processes: int, of: int) -> None:
    """Raises ConfigError unless groups of `processes` make up all `of` of a run."""
    if of % processes:
        raise ConfigError(
            f"experts are to be shared among {processes} processes (engine.expert_parallel), which do not divide the "
            f"{of} of this run; start another number, or share them among fewer"
        )


def share_experts(model: nn.Module, processes: int) -> None:
    """Cuts the experts of every layer among `processes` neighbouring processes, before deepspeed.initialize.

    Raises ConfigError where they do not divide all processes, or the experts.
    """
    from deepspeed.utils import groups

    check_groups(processes, of=dist.get_world_size())
    name = f"ep_size_{processes}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(processes)
    shard_experts(model, groups._get_expert_parallel_group(name))
    for parameter_name in parallel_parameters(model):
        parameter = model.get_parameter(parameter_name)
        parameter.allreduce, parameter.group_name = False, name
    model.add_module(MARKER, _marker(name))


def parameter_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """For an optimizer: those that all processes share, and, where there are any, those of this process's experts."""
    from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

    if not any(map(is_moe_param, parameters)):
        return [{"params": parameters}]
    shared = {"params": parameters, "name": "shared"}
    return split_params_into_different_moe_groups_for_optimizer(shared, max_group_size=None)


def _marker(group_name: str) -> nn.Module:
    from deepspeed.moe.layer import MoE

    class Marker(MoE):
        """What DeepSpeed's engine asks of one of its MoE layers, of one without experts."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.expert_group_name = group_name
            self.num_experts = self.num_local_experts = 0

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            pass  # the groups are there

    return Marker()
