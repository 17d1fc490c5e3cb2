"""Which tests say whether the CPU engine computes right: run under sanitizers (sanitize.py) and on the paths that other
processors take (other_processors.py)."""

OPS = ("extension", "cpu_engine", "cpu_routing", "ops", "layer")  # what calls the library most, at all sizes
# And what computes with it: models before and after upcycling, their checkpoints, wrappers and training.
USERS = ("analysis", "checkpoint", "dense_mlps", "huggingface", "loss_scale", "models", "multiscale", "routers_v2")
USERS += ("upcycle", "wrappers", "train/test_model", "train/test_training")

# Not those with backend="reference", which does not call it, nor those of a compiler's graphs, the same whatever runs.
ENGINE_ONLY = ("-k", "not ([reference] or [reference- or -reference or compiles)")


def files(names: tuple[str, ...]) -> list[str]:
    return [f"{name}.py" if "/" in name else f"test_{name}.py" for name in names]
