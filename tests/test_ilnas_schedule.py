"""When and how far the architecture grows, and the learning rate."""

import math
from pathlib import Path

import pytest

from ilnas.config import make_config, options_markdown, read_toml, to_toml
from ilnas.schedule import ArchitectureSchedule, alr_factor, learning_rate, solve_targets


@pytest.mark.parametrize("decay", ["constant", "cosine", "exponential"])
@pytest.mark.parametrize("alr", [0.03, 0.05, 0.3, 2.0])
def test_solved_targets_end_on_the_budget_and_stay_near_alr(decay, alr):
    targets = solve_targets(1000, 10_000, alr, decay, 10_000)
    sizes = [1000, *targets]
    assert targets[-1] == 10_000
    assert all(a < b <= 10_000 for a, b in zip(sizes, targets, strict=False))
    rates = [b / a - 1 for a, b in zip(sizes, targets, strict=False)]
    # Scaled down in the exponent, so never over A_lr but for the rounding up to a whole parameter.
    assert all(rate <= alr * alr_factor(decay, k / len(rates)) + 1 / 1000 for k, rate in enumerate(rates))
    fewer = sum(math.log1p(alr * alr_factor(decay, k / (len(rates) - 1))) for k in range(len(rates) - 1))
    assert len(rates) == 1 or fewer < math.log(10)


def test_solved_targets_when_there_is_no_room():
    assert solve_targets(100, 100, 0.1, "constant", 50) == []
    assert solve_targets(100, 1000, 0.1, "constant", 2)[-1] == 1000


@pytest.mark.parametrize("move", [0.0, 0.2])
@pytest.mark.parametrize("method", ["ilnas", "random"])
def test_growth_ends_exactly_where_the_schedule_says(method, move):
    config = make_config({"budget": 5000, "growth_end": 0.5, "move": move, "move_end": 0.75, "method": method})
    schedule = ArchitectureSchedule(config, 1000, 400, 10)
    live, changes = 1000, {}
    for step in range(400):
        if (target := schedule.due(step, live)) is not None:
            changes[step] = live = target
            schedule.record_expansion(step)
    growth = {step: target for step, target in changes.items() if step <= 200}
    assert changes[200] == 5000 > max(target for step, target in growth.items() if step < 200)
    assert min(changes) > schedule.first
    moves = {step: target for step, target in changes.items() if step > 200}
    assert moves == (dict.fromkeys(range(205, 301, 5), 5000) if move else {})


def test_the_moved_share_falls_to_nothing():
    config = make_config({"move": 0.2, "move_end": 0.8, "growth_start": 0.2, "growth_end": 0.3})
    schedule = ArchitectureSchedule(config, 1000, 400, 10)
    assert [schedule.moved(step, 1000) for step in (80, 200, 320)] == [200, 100, 0]


def test_interval_trigger_grows_by_alr_and_stops_at_the_budget():
    config = make_config(
        {
            "trigger": "interval",
            "interval": 2.0,
            "alr": 0.5,
            "alr_decay": "constant",
            "budget": 3000,
            "growth_end": 1.0,
            "growth_start": 0.0,
            "move": 0.0,
        }
    )
    schedule = ArchitectureSchedule(config, 1000, 100, 5)
    live, seen = 1000, []
    for step in range(100):
        if (target := schedule.due(step, live)) is not None:
            live = target
            seen.append((step, target))
            schedule.record_expansion(step)
    assert seen == [(10, 1500), (20, 2250), (30, 3000)]


def test_plateau_trigger_waits_for_the_loss():
    config = make_config({"trigger": "plateau", "patience": 5, "interval": 1e6, "growth_start": 0.0})
    schedule = ArchitectureSchedule(config, 1000, 1000, 10)
    for step in range(30):  # falls by 5 % a step
        assert schedule.due(step, 1000) is None
        schedule.record_loss(0.95**step)
    for _ in range(10):
        schedule.record_loss(0.2)
    assert schedule.due(40, 1000) == 1000 + math.ceil(schedule.alr(40) * 1000)
    restored = ArchitectureSchedule(config, 1000, 1000, 10)
    restored.load_state_dict(schedule.state_dict())
    assert restored.due(40, 1000) == schedule.due(40, 1000)
    schedule.record_expansion(40)
    assert schedule.due(41, 1100) is None


def test_plateau_trigger_waits_no_longer_than_the_interval():
    given = {
        "trigger": "plateau", "patience": 5, "interval": 3.0, "tolerance": 0.01, "growth_start": 0.0, "growth_end": 0.5,
        "alr": 0.1, "alr_decay": "constant", "budget": 2000, "move": 0.0,
    }  # fmt: skip
    schedule = ArchitectureSchedule(make_config(given), 1000, 1000, 10)
    live, steps = 1000, []
    for step in range(500):  # the loss falls all the while
        if (target := schedule.due(step, live)) is not None:
            steps.append(step)
            live = target
            schedule.record_expansion(step)
        schedule.record_loss(0.95**step)
    assert steps == [30 * k for k in range(1, len(steps) + 1)]
    assert live == 2000
    assert schedule.due(600, live) is None  # the architecture is fixed from growth_end on


@pytest.mark.parametrize("trigger", ["interval", "plateau", "solved"])
@pytest.mark.parametrize(("move", "last"), [(0.0, 60), (0.1, 80)])
def test_the_last_epochs_have_a_fixed_architecture(trigger, move, last):
    given = {"growth_end": 0.6, "move_end": 0.8, "move": move, "alr": 0.01, "interval": 0.1, "budget": 2000}
    schedule = ArchitectureSchedule(make_config({"trigger": trigger} | given), 1000, 100, 10)
    live, due = 1000, []
    for step in range(100):
        if (target := schedule.due(step, live)) is not None:
            live = max(live, target)
            due.append(step)
            schedule.record_expansion(step)
    assert 50 < max(due) <= last


@pytest.mark.parametrize("decay", ["constant", "cosine", "exponential"])
def test_alr_decay(decay):
    factors = [alr_factor(decay, k / 10) for k in range(11)]
    assert factors[0] == pytest.approx(1.0)
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx({"constant": 1.0, "cosine": 0.1, "exponential": math.exp(-3)}[decay])
    middle = {"constant": 1.0, "cosine": 0.55, "exponential": math.exp(-1.5)}[decay]
    assert factors[5] == pytest.approx(middle)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_moving_methods_keep_the_size(method):
    config = make_config({"method": method, "move": 0.3})
    schedule = ArchitectureSchedule(config, 2000, 400, 10)
    targets = [schedule.due(step, 2000) for step in range(400)]
    assert {t for t in targets if t is not None} == {2000}
    assert schedule.moved(schedule.first, 2000) == 600
    assert schedule.moved(schedule.last, 2000) == 0


def test_pruning_falls_to_the_budget():
    config = make_config({"method": "prune", "budget": 500})
    schedule = ArchitectureSchedule(config, 9000, 400, 10)
    targets = [t for step in range(400) if (t := schedule.due(step, 9000)) is not None]
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == 500


@pytest.mark.parametrize("method", ["static", "dense"])
def test_fixed_methods_never_change(method):
    schedule = ArchitectureSchedule(make_config({"method": method}), 2000, 100, 10)
    assert all(schedule.due(step, 2000) is None for step in range(100))


def test_learning_rate():
    config = make_config({"lr": 0.4, "warmup": 0.1})
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[9] == rates[10] == 0.4
    assert rates[55] == pytest.approx(0.2)
    assert 0 < rates[-1] < 0.001


def test_options_survive_toml(tmp_path):
    config = make_config({"preset": "paper", "data": 'odd "name\\', "flip": 1, "hyper_step": False, "lr": 1})
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert make_config(read_toml(tmp_path / "config.toml")) == config


def test_presets_and_what_wins():
    assert make_config({"preset": "paper"}).selection == "top"
    assert make_config({"preset": "paper"}, {"selection": "sampled"}).selection == "sampled"
    assert make_config({"alr": 0.3}, {"alr": 0.03}).alr == 0.03


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0}, "--budget must lie in"),
        ({"move": 1.5}, r"--move must lie in \[0\.0, 1\.0\], got 1\.5"),
        ({"method": "magic"}, "--method must be one of ilnas"),
        ({"widths": "8,x"}, "--widths: '8,x' is not a list"),
        ({"widths": "8,0"}, "every layer needs at least one node"),
        ({"colour": 1}, "unknown option 'colour'"),
        ({"epochs": "3"}, "option epochs must be of type int"),
        ({"growth_start": 0.9}, "--growth-start"),
        ({"preset": "other"}, "--preset must be one of"),
        ({"autocast": "int8"}, "--autocast"),
    ],
)
def test_bad_options_name_the_option_and_the_rule(given, message):
    with pytest.raises(ValueError, match=message):
        make_config(given)


def test_bad_toml(tmp_path):
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(ValueError, match="not valid TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_toml(tmp_path / "none.toml")


def test_the_documented_options_are_the_real_ones():
    """After a change: python -c "from ilnas.config import *; print(options_markdown(), end='')" > docs/options.md"""
    documented = Path(__file__).parents[1] / "docs" / "options.md"
    assert documented.read_text() == options_markdown()
