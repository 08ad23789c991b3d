"""Which expert serves which step; the grids themselves are compared in tests/oracle."""

import pytest

from reelpool.runtime.schedule import expert_steps, make_schedule

COUNTS = {  # id: (solver, steps, shift, boundary, counts)
    "T2V-A14B": ("unipc", 40, 12.0, 0.875, (26, 14)),
    "I2V-A14B": ("unipc", 40, 5.0, 0.9, (15, 25)),
    "T2V-A14B, 4 steps": ("unipc", 4, 5.0, 0.875, (2, 2)),
    "I2V-A14B, 4 steps": ("unipc", 4, 5.0, 0.9, (2, 2)),
    "T2V-A14B, Euler": ("euler", 40, 12.0, 0.875, (25, 15)),
    "I2V-A14B, Euler": ("euler", 40, 5.0, 0.9, (14, 26)),
}


@pytest.mark.parametrize("case", COUNTS)
def test_experts_take_the_steps_of_the_reference(case):
    solver, steps, shift, boundary, counts = COUNTS[case]
    assert expert_steps(make_schedule(solver, steps, shift), 2, boundary) == counts


def test_one_expert_takes_all_steps_whatever_the_boundary():
    assert expert_steps(make_schedule("unipc", 7, 5.0), 1, 0.9) == (7,)


def test_a_timestep_at_the_boundary_is_high_noise():
    schedule = make_schedule("unipc", 4, 5.0)
    assert schedule.timesteps == (999.0, 937.0, 833.0, 625.0)
    assert expert_steps(schedule, 2, 0.833) == (3, 1)
    assert expert_steps(schedule, 2, 0.8331) == (2, 2)
