"""The simulation of a whole run: against the chaos campaign's figures, against theory, and against itself."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package
simulate = importlib.import_module("simulate")

PLAIN = simulate.Job(interval=300, stall=2, write=0, restart=40, between_failures=5_000)
FULL = replace(PLAIN, write=20, first_batch=0.5, starved=0.1, between_outages=40_000, outage=120, buffered=5)
SLOW_WRITES = replace(FULL, interval=30, write=45)


def goodput(job: Any, failures: float = 2_000, seed: int = 0) -> float:
    return float(simulate.simulate(job, failures, seed).share("useful"))


def test_the_chaos_campaign_is_within_two_points_of_its_share() -> None:
    figures = simulate.measured()
    assert goodput(simulate.campaign(figures)) == pytest.approx(figures["share"], abs=0.02)


def test_the_run_that_the_campaign_kills_again_and_again_is_within_two_points_of_what_was_measured() -> None:
    row = simulate.killed_row()
    spent = simulate.killed_run(row).run()
    assert spent.failures == len(row["kills"]) > 10
    assert spent.share("useful") == pytest.approx(row["value"], abs=0.02)


def test_restarts_and_stalls_weigh_in_the_campaigns_share_as_they_should() -> None:
    """Its two formulas, at costs at which an error would show."""
    costly = {"restart": 60.0, "stall": 0.5}
    campaign = importlib.import_module("chaos.campaign")
    assert goodput(simulate.campaign(costly)) == pytest.approx(campaign.effective(**costly), abs=0.02)


@pytest.mark.parametrize("job", [PLAIN, FULL, SLOW_WRITES])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_parts_add_up_to_the_whole_exactly(job: Any, seed: int) -> None:
    spent = simulate.simulate(job, 300, seed)
    assert spent.useful + spent.data + spent.saves + spent.restarts + spent.lost == spent.total
    assert 200 < spent.failures < 600 and min(spent.useful, spent.saves, spent.restarts, spent.lost) > 0


def test_without_failures_only_the_saves_are_missing() -> None:
    spent = simulate.Simulation(replace(PLAIN, between_failures=math.inf), work=3_000_000).run()
    assert (spent.failures, spent.lost, spent.restarts, spent.data) == (0, 0, 0, 0)
    assert spent.useful == 3_000_000 * simulate.MICROSECONDS
    assert spent.saves == 9_999 * 2 * simulate.MICROSECONDS  # none at the end


@pytest.mark.parametrize("job", [PLAIN, FULL])
def test_more_failures_leave_less(job: Any) -> None:
    shares = [goodput(replace(job, between_failures=seconds)) for seconds in (1e6, 1e5, 1e4, 1e3, 300)]
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] > 0.4


def test_time_is_what_theory_says_where_theory_is_exact() -> None:
    """Daly 2006, equation 20: with saves that training waits for, exponential failures, also during restarts."""
    for job in (PLAIN, replace(PLAIN, restart=900), replace(PLAIN, interval=4_000)):
        mean = job.between_failures
        factor = mean * math.exp(job.restart / mean) * math.expm1((job.interval + job.stall) / mean) / job.interval
        assert 1 / goodput(job, 20_000) == pytest.approx(factor, rel=0.02)


def test_a_seed_has_one_result() -> None:
    assert simulate.simulate(FULL, 100, 3) == simulate.simulate(FULL, 100, 3) != simulate.simulate(FULL, 100, 4)


@pytest.mark.parametrize("job", [PLAIN, FULL, SLOW_WRITES])
def test_saves_skipped_at_once_count_as_one_by_one(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = simulate.simulate(job, 100)
    monkeypatch.setattr(simulate.Simulation, "_skip_quiet_saves", lambda _: None)
    assert simulate.simulate(job, 100) == at_once


def test_an_outage_costs_what_the_batches_in_memory_do_not_bridge() -> None:
    job = replace(PLAIN, between_failures=math.inf, between_outages=50_000, outage=120)
    shares = [
        simulate.Simulation(replace(job, buffered=buffered), 3_000_000).run().share("data") for buffered in (120, 20, 0)
    ]
    assert shares[0] == 0 < shares[1] < shares[2]
    assert shares[1] / shares[2] == pytest.approx(100 / 120, rel=0.02)


def test_a_save_that_is_not_whole_is_no_checkpoint() -> None:
    """A failure while the newest save is written goes back to the one before."""
    slow = replace(PLAIN, write=290)
    assert simulate.simulate(slow, 2_000).share("lost") > 1.5 * simulate.simulate(PLAIN, 2_000).share("lost")


@pytest.mark.parametrize("between_failures", [1e3, 1e4, 1e6])
def test_no_interval_is_much_better_than_dalys(between_failures: float) -> None:
    interval = simulate.save_interval(PLAIN.stall, between_failures)
    job = replace(PLAIN, interval=interval, between_failures=between_failures)
    points = simulate.curve(job, 2_000, least=1.0)
    best = max(spent.share("useful") for spent in points.values())
    assert best - 0.002 < points[interval].share("useful")
    assert min(spent.share("useful") for spent in points.values()) < best - 0.002


def test_storage_is_shared() -> None:
    storage = simulate.Storage()
    assert storage.write_seconds(1e12, 10) > storage.write_seconds(1e12, 50) == storage.write_seconds(1e12, 500)
