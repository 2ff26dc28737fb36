"""The watchdog of a step, by a clock of our own."""

from ringbpt.training.watchdog import Watchdog


def test_a_step_that_takes_too_long_leaves_the_stacks_and_gives_up(tmp_path):
    now, said = [100.0], []
    watchdog = Watchdog(60, tmp_path, said.append, lambda: now[0])
    now[0] += 1000
    watchdog.look()  # nothing has begun: what is compiled takes its time
    watchdog.at(7)
    now[0] += 59
    watchdog.look()
    watchdog.at(8, watched=False)
    now[0] += 1000
    watchdog.look()
    assert said == [] and list(tmp_path.iterdir()) == []
    watchdog.at(8)
    now[0] += 61
    watchdog.look()
    watchdog.look()
    assert said == [
        f"step 9 has taken more than 60 s (--jax_distributed.step_timeout): all stacks are in {tmp_path}/stacks.txt"
    ]
    assert "test_a_step_that_takes_too_long" in (tmp_path / "stacks.txt").read_text()
    watchdog.close()


def test_no_limit(tmp_path):
    said, now = [], [1.0]
    watchdog = Watchdog(0, tmp_path, said.append, lambda: now[0])
    watchdog.at(1)
    now[0] = 1e9
    watchdog.look()
    assert said == []
