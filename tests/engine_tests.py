"""Which tests say whether the CPU engine computes right: run under sanitizers (sanitize.py) and on the paths that other
processors take (other_processors.py)."""

OPS = ("extension", "cpu_engine", "cpu_routing", "ops", "layer")  # what calls the library most, at all sizes

# Where no layer computes: other machines' code, the GPU's, installation, data, and what is counted on shapes alone.
NO_LAYERS = ("test_arm.py", "test_cuda_extension.py", "test_device_check.py", "test_doctor.py", "test_kernel_cache.py")
NO_LAYERS += ("test_launches.py", "test_race.py", "environments", "kernels", "train/test_chat.py", "train/test_data.py")
NO_LAYERS += ("train/test_images.py", "train/test_plan.py", "train/test_sampler.py")

# Not those with backend="reference", which does not call it, nor those of a compiler's graphs, the same whatever runs.
ENGINE_ONLY = ("-k", "not ([reference] or [reference- or -reference or compiles)")
