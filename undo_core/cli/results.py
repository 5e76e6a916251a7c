"""Commands for results: the metrics of a checkpoint, and reports on runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from undo_core import distributed
from undo_core.cli.folders import check_finite, check_prepared
from undo_core.data.questions import DESCRIPTION
from undo_core.io.progress import console
from undo_core.io.untrusted import refused
from undo_core.models.folder import check_checkpoint


def evaluate(
    model: str,
    data: str | None = None,
    multiple_choice: list[str] | str = [],  # noqa: B006
    examples: list[str] | str = [],  # noqa: B006
    shots: int = 0,
    description: str = DESCRIPTION,
    limit: float = 1.0,
    special_tokens: Literal["text", "parse"] = "text",
) -> int:
    """Print metrics of the checkpoint MODEL as JSON, with 95 % intervals.

    On the test sequences of DATA: undo evaluate MODEL DATA. On multiple-choice questions, scored as in lm-eval's WMDP and MMLU
    tasks: undo evaluate MODEL --multiple-choice wmdp.jsonl; 5-shot MMLU: --multiple-choice mmlu.parquet --examples dev.parquet
    --shots 5

    Args:
        model: Hugging Face checkpoint folder.
        data: folder made by ``undo prepare``.
        multiple_choice: JSONL or Parquet files, or hf://name[:config[:split]] (cais/mmlu:all), with the columns question,
            choices, answer (an index) and subject.
        examples: sources of answered questions in the same form; the first ``shots`` of the question's subject are shown before
            it.
        shots: number of examples before each question.
        description: text at the start of the prompt; {subject} in it is replaced by the question's subject.
        limit: share of the questions of each subject to use, from the first on; published for MMLU: 0.4.
        special_tokens: how to read a control token that is written out in a question. text: as ordinary characters; parse: as
            that token.
    """
    from undo_core.evaluation.multiple_choice import MultipleChoiceConfig
    from undo_core.evaluation.multiple_choice import multiple_choice as score
    from undo_core.models import load_model, load_tokenizer
    from undo_core.pipeline.prepared import evaluate_folder

    if data is None and not multiple_choice:
        raise ValueError("data: got none and no multiple_choice, wanted one of the two")
    check_checkpoint("model", Path(model))
    check_finite("model", Path(model))
    metrics: dict[str, Any] = {}
    files, shown = ([paths] if isinstance(paths, str) else list(paths) for paths in (multiple_choice, examples))
    config = MultipleChoiceConfig(files, shown, shots, description, limit, special_tokens) if files else None
    if data is not None:
        check_prepared(Path(data))
        metrics = evaluate_folder(Path(model), Path(data))
    if config is not None:
        metrics["multiple_choice"] = distributed.on_first(lambda: score(load_model(model), load_tokenizer(model), config))
    distributed.on_first(lambda: print(json.dumps(metrics, indent=1)))
    return 0


def report(paths: list[str], output: str | None = None, title: str = "UNDO") -> int:
    """Write figures, tables and pages from the results of one run, of its seeds, or of many runs.

    Checkpoints that ``undo attack`` attacked alike share one report.html, also if their output folders differ.

    All other runs get comparison.html, points.csv (every plotted value with the folder that it comes from) and methods.md, .tex and
    .csv. Runs that differ only in their seed get report.html as well.

    Args:
        paths: results-seedN.json files, folders of runs, or folders of sweeps.
        output: folder to make; None for the folder ``report`` inside PATHS, if that is a single folder.
        title: title of the pages.
    """
    from undo_core.report.compare import load

    loaded = load([Path(path) for path in paths])
    if output is None:
        if len(paths) > 1 or not Path(paths[0]).is_dir():
            raise ValueError(
                f"output: got none with {', '.join(paths)}, wanted an output folder, because the paths are not a single folder"
            )
        output = str(Path(paths[0]) / "report")
    with refused(f"results: got {', '.join(paths)}, of which no report can be made", ValueError):
        _report(loaded, Path(output), title)
    return 0


def _report(loaded: list[tuple[str, dict[str, Any]]], output: Path, title: str) -> None:
    from undo_core.report import terminal_table, write_report
    from undo_core.report.compare import comparison_table, write_comparison
    from undo_core.report.defences import DEFENCE, merged

    if any(entry["kind"] == DEFENCE for _, values in loaded for entry in values["models"]):
        results = merged([values for _, values in loaded])
        page = write_report(results, output, title)
        console.print(terminal_table(results))
        console.print(str(page))
        return
    if len({folder for folder, _ in loaded}) == 1:
        results = [values for _, values in loaded]
        page = write_report(results, output, title)
        console.print(terminal_table(results))
        console.print(str(page))
    page = write_comparison(loaded, output, title)
    console.print(comparison_table(loaded))
    console.print(str(page))
