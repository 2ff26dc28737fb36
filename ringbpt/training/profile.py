"""--profile=first,count: what the devices do in these steps, as a trace for xprof, Perfetto and TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from ringbpt.config import Config, parse_profile
from ringbpt.training.metrics import say

T = TypeVar("T")


class Profile:
    """Traces the steps that --profile names, as metrics number them, into `folder`/profile.

    Of several processes the first one does: all run one program, and its devices show what every device does. The trace
    begins when nothing is under way any more, and ends when the last of its steps is done, so it has these steps whole
    and no other. start: the step that the run goes on from.
    """

    def __init__(self, config: Config, folder: Path, start: int):
        self._steps, self._folder, self._is_on = parse_profile(config.profile, config.total_steps), folder, False
        if self._steps and start >= self._steps.start:
            say(f"--profile={config.profile}: the run goes on from step {start}: nothing is traced")
            self._steps = range(0)
        if jax.process_index():
            self._steps = range(0)

    def __call__(self, number: int, program: Callable[..., T], *args: object) -> T:
        """program(*args), which is step `number`; waited for where the trace begins or ends with it."""
        if number not in self._steps:
            return program(*args)
        if number == self._steps.start:
            jax.block_until_ready(args)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else each call of Python is an event, and slower than it is
            jax.profiler.start_trace(self._folder / "profile", profiler_options=options)
            self._is_on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = program(*args)
            if number == self._steps[-1]:
                jax.block_until_ready(result)
        if number == self._steps[-1]:
            self.close()
        return result

    def close(self) -> None:
        """Writes the trace, if one was begun."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            say(f"wrote {self._folder / 'profile'}: the trace of --profile, for xprof or TensorBoard")
