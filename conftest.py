"""Options of the benchmarks (benchmarks/conftest.py).

They are here because pytest takes options only from the conftest files above what it is given and from the root's, so
that `pytest . --benchmark` knows them as well as `pytest benchmarks/ --benchmark`.
"""

import os


def pytest_addoption(parser):
    group = parser.getgroup("libmoe_fast benchmarks")
    group.addoption("--benchmark", action="store_true", help="measure, instead of running each benchmark once, tiny")
    group.addoption("--preset", help="of libmoe-fast bench (default: quick with --benchmark, else tiny)")
    group.addoption("--results", metavar="FOLDER", help="write results.json, results.md and plots there")
    group.addoption(
        "--threads",
        type=int,
        default=os.environ.get("OMP_NUM_THREADS", os.cpu_count()),  # the tests, for themselves, set the variable to 1
        help="CPU threads with --benchmark (default: OMP_NUM_THREADS, else one per core)",
    )


def pytest_configure(config):
    if not config.option.benchmark:
        config.option.benchmark_disable = True  # pytest-benchmark then runs each once and reports nothing
    if config.option.preset is None:
        config.option.preset = "quick" if config.option.benchmark else "tiny"
