"""What tests of trainings and experiments need: a kill at a given step, and runs that remember what was asked for."""

from __future__ import annotations


class KilledError(Exception):
    """Stands for the signal that ends a process."""


class KillAt:
    """Progress callback that counts steps, over several trainings, and ends the one that reaches number ``kill_at``."""

    def __init__(self, kill_at):
        self.kill_at, self.steps = kill_at, 0

    def __call__(self, number, total, loss):
        self.steps += 1
        if self.steps == self.kill_at:
            raise KilledError


def remembering(run_task, finished):
    """``run`` of an experiment's settings, and the list of all tasks that it was asked for.

    ``finished`` (key -> rows) keeps what was run, for the next test too.
    """
    asked = []

    def run(tasks):
        asked.extend(tasks)
        for task in tasks:
            if task.key() not in finished:
                finished[task.key()] = run_task(task)
        return [row for task in tasks for row in finished[task.key()]]

    return run, asked
