"""The command that attacks checkpoints made anywhere and compares them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from undo_core.io.progress import console
from undo_core.models.folder import check_checkpoint
from undo_core.pipeline.attack_config import AttackRunConfig


def attack(checkpoints: list[str], config: AttackRunConfig, command: str = "", dry_run: bool = False) -> int:
    """Attack any CHECKPOINTS with the full envelope of relearning attacks and compare them in one table and figure.

      undo attack their-model --data.retain=[keep.txt] --data.forget=[forget.txt] --output=runs/attack
      undo attack tar=their-model undo=runs/ours/stages/distill-0a1b --original=base ... --output=runs/attack
      undo attack their-model ... --output=runs/attack --dry-run

    A checkpoint is a folder that AutoModelForCausalLM loads, with its tokenizer. NAME=FOLDER names its row; a folder alone is
    named after itself. Each checkpoint reads the text with its own tokenizer, and losses are in nats per byte of the text, so that
    models with different tokenizers compare. With --data.questions, performance is the accuracy instead.

    The attacks are fine-tuning on forget text (relearn), on half retain text (mixed), on retain text alone (benign), LoRA (adapters)
    and rounding of the weights (quantised), over a grid of learning rates that grows while the worst rate is at its end. The worst
    case counts. The settings of --relearn hold for all of them; --attacks replaces the others.

    With --original and --reference, a checkpoint that never had the capability, the report also says how many times the reference's
    FLOPs an attack on each checkpoint needs.

    OUTPUT gets report/report.html, results-seedN.json, and a folder for each checkpoint, defences/NAME, in the layout of
    TamperBench. A later call with the same settings and OUTPUT adds its checkpoints to the table. After an interruption, the same
    command continues.

    Args:
        checkpoints: FOLDER or NAME=FOLDER of each checkpoint.
        config: text, attacks and output.
        dry_run: print the stages with their steps, time and peak memory, and attack nothing.
    """
    from undo_core.pipeline.attack_run import as_run, attack_checkpoints, defences_of, named_checkpoint

    if not checkpoints:
        raise ValueError("checkpoints: got none, wanted at least one checkpoint folder")
    for given in config.every(checkpoints):
        name = "checkpoints" if given in checkpoints else "reference" if given == config.reference else "original"
        check_checkpoint(name, Path(named_checkpoint(given)[1]))
    if dry_run:
        from undo_core.planning.table import stages_table

        out = console if console.is_terminal else Console(width=110, highlight=False, markup=False)
        for defence in defences_of(checkpoints, config):
            lines = [(defence.prepared.title, [defence.prepared])]
            lines += [line for attacked in defence.attacks.values() for line in attacked.lines()]
            out.print(stages_table(as_run(config, defence.prepared.model.path), lines, defence.prepared))
        return 0
    attack_checkpoints(checkpoints, config, command)
    return 0
