"""Commands for whole runs and for this machine: run, sweep, plan and doctor."""

from __future__ import annotations

import sys

from rich.console import Console

from undo_core.io.progress import console
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.sweep_config import SweepConfig


def run(config: RunConfig, command: str) -> int:
    """Run a configuration."""
    from undo_core.pipeline.run import run as run_pipeline

    if config.parallel.tensor > 1:  # its stages would find out only when the first of them trains
        from undo_core.distributed.vocabulary import check_shareable
        from undo_core.pipeline.described import planned_skeleton

        check_shareable(planned_skeleton(config))
    run_pipeline(config, command)
    return 0


def sweep(config: SweepConfig, command: str, dry_run: bool) -> int:
    """Run a sweep, or print what it would run."""
    from undo_core.pipeline.sweep import run_sweep, sweep_table

    if dry_run:
        out = console if console.is_terminal else Console(width=120, highlight=False, markup=False)
        out.print(sweep_table(config))
        return 0
    failures = run_sweep(config, command)
    for line in failures:
        print(f"undo: failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def plan(config: RunConfig, memory: str | None = None, ranks: int = 1) -> int:
    """Print what a configuration would do and, with ``memory``, the settings with which every stage fits in it.

    Raises:
        ValueError: no change of settings is enough.
    """
    from undo_core.planning.fit import bytes_of, fit_notes
    from undo_core.planning.table import plan_table

    limit = None if memory is None else bytes_of(memory)
    if ranks < 1:
        raise ValueError(f"ranks: got {ranks}, wanted an integer >= 1")
    if ranks > 1 and limit is not None:
        raise ValueError(
            f"ranks: got {ranks} with memory {memory}, wanted one of the two: settings are searched for one process"
        )
    out = console if console.is_terminal else Console(width=100, highlight=False, markup=False)
    out.print(plan_table(config, ranks))
    if limit is None:
        return 0
    flags, hopeless = fit_notes(config, limit)
    if hopeless:
        raise ValueError(f"memory: got {memory}, which is too little: {'; '.join(hopeless)}")
    out.print(f"\nEvery stage fits in {memory}." if not flags else f"\nFor every stage to fit in {memory}, cheapest first:")
    for line in flags:
        out.print(f"  {line}", soft_wrap=True)
    if config.workers > 1:
        out.print(f"{memory} is for one stage; {config.workers} run side by side. With --workers=1 they run one by one.")
    return 0


def doctor() -> int:
    """Print versions, devices and backends, and whether each kernel works."""
    from undo_core.cli.doctor import run_doctor

    return run_doctor()
