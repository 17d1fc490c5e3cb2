"""`pytest benchmarks/ --benchmark [--preset full]` measures; without the flag every benchmark runs once, tiny.

pytest-benchmark times ours, and within each of its rounds the limit and the peers are timed as well. Its own options
(--benchmark-json, --benchmark-compare, ...) work as usual; ours (../conftest.py) writes libmoe-fast's report with
--results. A growth series is timed size by size here, since pytest runs test by test; `libmoe-fast bench` interleaves.
"""

from pathlib import Path

import pytest


def preset_of(config):
    from libmoe_fast.benchmarks.cases import find_preset
    from libmoe_fast.errors import ConfigError

    try:
        return find_preset(config.option.preset)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def device_of(config):
    from libmoe_fast.benchmarks.run import find_device

    return find_device(preset_of(config).device)


def pytest_generate_tests(metafunc):
    """One test per case of the preset that is of the file's subject: bench_layer.py -> "layer"."""
    if "case" in metafunc.fixturenames:
        subject = Path(metafunc.module.__file__).stem.removeprefix("bench_")
        cases = [case for case in preset_of(metafunc.config).cases if case.subject == subject]
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(items):
    from libmoe_fast.benchmarks.measure import make_clock

    for item in items:
        if hasattr(item, "callspec") and "race" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(group=item.callspec.params["case"].subject))
            item.add_marker(pytest.mark.benchmark(timer=make_clock(device_of(item.config))))
            if item.config.option.benchmark:
                item.add_marker(pytest.mark.timeout(0))  # as long as it takes


@pytest.fixture(scope="session")
def results(request):
    """Rows of all cases; shown, and written with --results, when all have run."""
    import torch

    from libmoe_fast.benchmarks.report import markdown, write_report
    from libmoe_fast.benchmarks.results import Results, environment

    option = request.config.option
    threads = torch.get_num_threads()
    torch.set_num_threads(option.threads if option.benchmark else 1)  # more only slow tiny sizes down
    gathered = Results(preset=option.preset, environment=environment(device_of(request.config)), rows=[], skipped=[])
    yield gathered
    torch.set_num_threads(threads)
    if option.benchmark and gathered.rows:
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print("\n" + markdown(gathered))
    if option.results:
        write_report(gathered, Path(option.results))


@pytest.fixture
def race(benchmark, request, results):
    """Runs a case: pytest-benchmark times ours, everybody else before each of its rounds."""
    from libmoe_fast.benchmarks.arena import OURS, build_arena
    from libmoe_fast.benchmarks.results import Skipped, rows_of, skipped_of
    from libmoe_fast.benchmarks.run import make_contest
    from libmoe_fast.errors import BackendError

    def run(case):
        device = device_of(request.config)
        try:
            arena = build_arena(case, device)
        except BackendError as error:
            results.skipped.append(Skipped(case=case.id, entrant=OURS, reason=str(error)))
            pytest.skip(str(error))
        contest, rounds = make_contest(arena, device), 1
        if request.config.option.benchmark:
            preset = preset_of(request.config)
            rounds = preset.rounds(contest.warm_up(patience=preset.patience))
        benchmark.pedantic(contest.first, setup=contest.others, rounds=rounds)
        rows = rows_of(case, arena, contest, device)
        for row in rows:
            assert row.time.median > 0
            benchmark.extra_info[row.entrant] = {"time": row.time.median, "over_limit": row.over_limit}
        results.rows.extend(rows)
        results.skipped.extend(skipped_of(case, arena))

    return run
