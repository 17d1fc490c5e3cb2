"""What the layers cost here, against their limits and against what one would use instead. Installed as
libmoe_fast.benchmarks; `libmoe-fast bench` and `pytest benchmarks/ --benchmark` run it."""
