"""The report's prose, generated from the numbers; it claims no more than they support."""

from __future__ import annotations

import re
import statistics
from typing import Any

from undo_core.report import inside, search, slowdown, students
from undo_core.report.metrics import LABELS, STUDENTS, ModelReport, Report, Stat
from undo_core.report.robustness import MIN_DENOMINATOR
from undo_core.report.table import hardly_forgotten, number, rate, ratio
from undo_core.unlearning.config import METHODS as _METHODS
from undo_core.unlearning.config import ROBUST

METHODS = {name: entry.title for name, entry in {**_METHODS, **ROBUST}.items()}
_SYMBOLS = {"alphas": "α", "beta": "β"}


def method_name(name: str) -> str:
    """Display form of a name: ``maxent+sam`` as MaxEnt + SAM, ``beta=0.1`` as β=0.1; other names unchanged."""
    parts = re.split(r"[-+_]", name)
    if all(part in METHODS for part in parts):
        return " + ".join(METHODS[part] for part in parts)
    return ", ".join(
        "=".join([_SYMBOLS.get(part.partition("=")[0], part.partition("=")[0]), *part.split("=")[1:]])
        for part in name.split(",")
    )


def opening(report: Report) -> list[str]:
    """Returns the paragraphs above the results: what the attack brought back, what was done, its limits, and what to try next."""
    paragraphs = (
        (_forgotten(report), back(report), _attacked(report), _ratios(report)),
        (_unrecovered(report),),
        (_done(report),),
        (_before(report), _better(report), _two_texts(report)),
        (_limits(report),),
        (_next(report),),
    )
    texts = [" ".join(part for part in parts if part) for parts in paragraphs]
    return [t.replace("α = ", "α\u00a0=\u00a0").replace("R = ", "R\u00a0=\u00a0").replace(" %", "\u00a0%") for t in texts if t]


def back(report: Report) -> str:
    """Says in which attacked models all of the original's forget performance is back, and after how many steps."""
    original, attacked = report.original("forget"), [model for model in report.main if model.worst]
    if not original or not attacked:
        return ""
    kept, taught, left = [], [], []
    found: dict[int, list[str]] = {}
    for model in attacked:
        step, before = report.back_after(model), model.metrics.get("forget")
        if model.never_had_it:
            taught += [f"{_name(model)} {_after(step)}"] if step is not None else []
        elif before and report.reaches(before.mean, original):
            kept.append(_name(model))
        elif step is not None:
            found.setdefault(step, []).append(_name(model))
        else:
            left.append(_name(model))
    spread = f", {'–'.join(number(end, report.higher) for end in original.spread)}" if original.spread else ""
    level = f"the original's forget performance ({_say(original, report)}{spread})"
    texts = []
    if found:
        parts = [f"in {_join(names)} {_after(step)}" for step, names in sorted(found.items())]
        texts.append(f"All of {level} is back {_join(parts)}.")
    if left:
        within = f"within {max(report.steps)} steps{_or_further(report)}"
        texts.append(f"Not all of {'it' if found else level} is back in {_join(left)} {within}.")
    if kept:
        texts.append(f"All of {'it' if texts else level} was there before the attack in {_join(kept)}.")
    if taught:
        level = "It" if texts else _upper(level)
        texts.append(
            f"{level} was also reached by {_join(taught)}, without having been there: so long an attack teaches it anew."
        )
    return " ".join(texts)


def _after(step: int) -> str:
    return f"after {step} attack step{'' if step == 1 else 's'}" if step else "before any step of training"


def captions(report: Report) -> dict[str, str]:
    """Returns a caption for each figure, ``{name: text}``."""
    band = (
        "Bands: smallest and largest seed." if len(report.seeds) > 1 else "Bands: 95 % intervals of the evaluation (one seed)."
    )
    better = "Lower is more robust" if report.higher else "Higher is more robust"
    better += ", except for models that did not recover." if any(model.censored for model in report.main) else "."
    most, worst = "; at every step the learning rate that recovers most of it counts", " that is worst for the forget set"
    if len(report.rates) == 1:
        most, worst = f" at the learning rate {rate(report.rates[0])}", f" {rate(report.rates[0])}"
    own = " Each attack is drawn at its own steps; the tables count each at its own headline step." if _further(report) else ""
    seeds = " Small points and whiskers: the seeds." if len(report.seeds) > 1 else ""
    return {
        "relearning": f"Forget performance during the attack{most}. The dashed line is the original model. {better} {band}{own}",
        "compute": "Robustness R against compute C, with a point per α; models without R or C are left out (see the table). C "
        "includes the unlearning, whose steps are converted to steps of as many tokens as the student's; FLOPs also include "
        f"the teacher's forward passes. The diagonal is drawn for orientation.{seeds}",
        "tradeoff": f"Retain against forget performance, before the attack (open) and after {report.headline} attack steps "
        f"(filled) at the learning rate{worst}; means over seeds.",
        "training": "Retain performance on the validation split during training. A student stops at its first evaluation that "
        "reaches the target; a cross marks one that reached its step limit first, and so did not recover.",
        "rates": "Forget performance at every learning rate of the attack, and the worst case over them.",
        **students.captions(report),
        **inside.captions(report),
        **search.captions(report),
        **slowdown.captions(report),
    }


def definitions(report: Report) -> list[tuple[str, str]]:
    """Returns the terms of the report, each with a one-line definition."""
    value, scored = f"mean cross-entropy in {report.unit.replace('/', ' per ')}", report.scored
    if report.higher:
        value = "share of prompts whose greedy answer matches exactly"
    if report.asked:
        value = "share of multiple-choice questions whose right letter is the likeliest"
    several = (
        "mean over seeds, with the smallest and the largest seed"
        if len(report.seeds) > 1
        else "one seed; ranges are 95 % intervals"
    )
    worst = "largest" if report.higher else "smallest"
    terms = {
        "retain, forget": f"{value}, on the test {scored} of what is to be kept and of what is to be forgotten",
        "held-out": "the same on problems that neither training nor an attack has seen",
        "values": f"{several}; an interval covers only the sampling of the evaluated {scored}, "
        + ("not training" if len(report.rates) == 1 else "neither training nor the choice of the worst rate"),
        "worst case": f"the {worst} forget {'accuracy' if report.higher else 'loss'} over {_over(report)}, chosen "
        "separately at each step",
        "all is back": "the worst case is at least as good as the worse end of the range of the original's forget performance",
        "unlearn only": "the suppressed model, which is also the teacher",
        "UNDO α": "a copy of it, damaged by noise of strength α and distilled back on unlabeled text",
        "random student": "the teacher distilled into a fresh initialisation",
        "data filtering": "trained from scratch without the forget set",
        "oracle matching": "the data-filtered model distilled into the original one",
        "R": "robustness, (P_undo − P_unlearn) / (P_filter − P_unlearn): 0 is unlearn only, 1 is data filtering; "
        f"P is the worst case after {report.headline} attack steps; n/a if the denominator is under "
        f"{MIN_DENOMINATOR:g}{'' if report.higher else ' nats'} in size",
        "C": "compute, S_undo / S_filter: the training until the retain target was first reached; it includes the unlearning, "
        "and in FLOPs the teacher's forward passes",
        "did not recover": "training reached its step limit before the retain target (in report.json: censored); the model has no R "
        "and no C, and its forget performance after an attack is no evidence of robustness",
    }
    kinds = {model.kind for model in report.models}
    if report.of("defence"):
        terms = {term: text for term, text in terms.items() if term not in ("R", "C", "did not recover")}
        if not report.higher:
            terms["nats per byte"] = (
                "the sum of the cross-entropies over the UTF-8 bytes of the same text, which compares models with different "
                "tokenizers; multiply by the bytes of a token to get nats per token"
            )
    if not any(model.worst for model in report.models):
        terms.pop("worst case"), terms.pop("R", None)
    if not back(report):
        terms.pop("all is back")
    if not any("heldout" in key for model in report.models for key in model.metrics):
        terms.pop("held-out")
    for kind, term in {
        "unlearn": "unlearn only",
        "random": "random student",
        "filter": "data filtering",
        "oracle": "oracle matching",
        "undo": "UNDO α",
    }.items():
        if kind not in kinds:
            terms.pop(term)
    return list(terms.items())


def _over(report: Report) -> str:
    """Describes the set that a worst case is chosen from."""
    if not _further(report):
        return "the attack's learning rates" if len(report.rates) != 1 else "the attack's one learning rate"
    return (
        "all attacks and their learning rates; each attack counts with its last evaluation up to the step, and after "
        f"{report.headline} steps with that at its own headline step"
    )


def unit(report: Report) -> str:
    """Unit that follows a number in a sentence."""
    return f" {report.unit}"


def _done(report: Report) -> str:
    if report.of("defence"):
        attacked = [model.label for model in report.of("defence")]
        return f"{_join(attacked)} {'was' if len(attacked) == 1 else 'were'} {_fine_tuned(report)}."
    config: dict[str, Any] = report.results[0].get("config") or {}
    unlearn = config.get("unlearn") or {}
    names = [name for name in (unlearn.get("method"), unlearn.get("robust")) if name and name != "none"]
    by = f" with {method_name('+'.join(names))}" if names else ""
    alphas = [f"{m.alpha:g}" for m in report.of("undo") if m.alpha is not None]
    text = f"The forget capability was suppressed{by}."
    if alphas:
        copies = "Copies of the result were" if len(alphas) > 1 else "A copy of the result was"
        text += f" {copies} damaged by noise (α = {', '.join(alphas)}) and distilled back on unlabeled text."
    if report.rates:
        text += f" Every model but the original was then {_fine_tuned(report)}."
    left = dict.fromkeys(e["left"] for m in report.models for e in m.entries.values() if e.get("left"))
    return " ".join([text, *(f"The damage left {one}." for one in left)])


def _fine_tuned(report: Report) -> str:
    """Says how the models were attacked."""
    rates = f"{len(report.rates)} learning rates, of which the worst counts"
    if len(report.rates) == 1:
        orders = any(len(attack["curves"]) > 1 for model in report.models for attack in model.attacks.values())
        rates = f"one learning rate, {rate(report.rates[0])}"
        rates += ", in several data orders, of which the worst counts" if orders else ""
    text = f"fine-tuned on the forget set at {rates}"
    further = _further(report)
    if further:
        text += f", or attacked in another way ({', '.join(further)}), each up to its own headline step, of which the worst counts too"
    return text


def _or_further(report: Report) -> str:
    """Phrase for further attacks, if any, that enter the worst case at the headline step."""
    return " (or as many as a further attack has)" if _further(report) else ""


def _further(report: Report) -> list[str]:
    """Names of the further attacks that enter the worst case."""
    entries = [entry for model in report.models for entry in model.entries.values()]
    named = [(name, attack) for entry in entries for name, attack in (entry.get("attacks") or {}).items()]
    return list(dict.fromkeys(name for name, attack in named if not attack.get("needs_original")))


def _before(report: Report) -> str:
    parts = []
    for model in [*report.of("original"), *report.of("unlearn"), *report.of("defence")]:
        scores = [f"{_say(model.metrics[key], report)} on {key}" for key in ("retain", "forget") if model.metrics.get(key)]
        if scores:
            parts.append(f"{_name(model)} scores {' and '.join(scores)}")
    students = report.of("undo")
    spans = [(key, [m.metrics[key] for m in students if m.metrics.get(key)]) for key in ("retain", "forget")]
    scores = [f"{_span(stats, report)} on {key}" for key, stats in spans if stats]
    if scores:
        who = "the UNDO student scores" if len(students) == 1 else "the UNDO students score"
        parts.append(f"{who} {' and '.join(scores)}")
    return f"Before the attack, {'. '.join([parts[0], *map(_sentence, parts[1:])])}." if parts else ""


def _span(stats: list[Stat], report: Report) -> str:
    low, high = (side(stats, key=lambda stat: stat.mean) for side in (min, max))
    return _say(low, report) if low.mean == high.mean else f"{number(low.mean, report.higher)} to {_say(high, report)}"


def _better(report: Report) -> str:
    """Explains why an unlearned model is better on retain than the range of the original's performance, if one is."""
    original = report.original("retain")
    if not original:
        return ""
    low, high = original.spread or (original.mean, original.mean)
    values = [
        (m, m.metrics["retain"].mean) for kind in ("unlearn", "defence") for m in report.of(kind) if m.metrics.get("retain")
    ]
    better = [m for m, value in values if (value > high if report.higher else value < low)]
    unlearn: dict[str, Any] = (report.results[0].get("config") or {}).get("unlearn") or {}
    if not better or unlearn.get("retain_weight") == 0:
        return ""
    why = "the unlearning" if report.of("unlearn") else "unlearning often"
    names = _join([_name(model) for model in better])
    text = (
        f"{names} {'is' if len(better) == 1 else 'are'} better on retain than the original: {why} also trains on retain data."
    )
    return _sentence(text)


def _two_texts(report: Report) -> str:
    if report.higher:
        return ""
    return "Retain and forget are different texts, so a loss on one does not compare with a loss on the other."


def _forgotten(report: Report) -> str:
    return f"{_upper(hardly_forgotten(report))}." if report.hardly_forgotten else ""


def _attacked(report: Report) -> str:
    at = {model.name: model.worst[report.headline] for model in report.models if model.worst.get(report.headline)}
    if not at:
        return "No model was attacked, so nothing is known about robustness." if report.models else ""
    parts = [f"{_name(m)} is at {_say(at[m.name], report)}" for m in report.of("unlearn") if m.name in at]
    students = [m for m in report.of("undo") if m.name in at and not m.censored]
    if students:
        low, high = (side(students, key=lambda m: at[m.name].mean) for side in (min, max))
        text = f"UNDO at {_say(at[low.name], report)} (α = {low.alpha:g})"
        if high is not low:
            lowest = number(at[low.name].mean, report.higher)
            text = f"UNDO between {lowest} (α = {low.alpha:g}) and {_say(at[high.name], report)} (α = {high.alpha:g})"
        parts.append(text)
    controls = [m for kind in ("random", "filter") for m in report.of(kind) if m.name in at and not m.censored]
    parts += [f"{_name(m)} at {_say(at[m.name], report)}" for m in controls]
    parts += [f"{_name(m)} is at {_say(at[m.name], report)}" for m in report.of("defence") if m.name in at]
    if not parts:
        return ""
    measured = "accuracy" if report.higher else "loss"
    return f"After {report.headline} attack steps{_or_further(report)}, in forget {measured}, {_join(parts)}."


def _unrecovered(report: Report) -> str:
    """Names the models that did not recover, each with its retain beside its target, and says what their forget does not show."""
    models = [m for m in report.models if m.censored]
    if not models:
        return ""
    limits, attacked = [], []
    for model in models:
        seeds = [
            seed for seed in model.censored if (model.trainings[seed].get("history") or [{}])[-1].get("retain") is not None
        ]
        text = f"{_name(model)} did not recover its retain performance{_in_seeds(model, report)}"
        if seeds:
            reached = statistics.fmean(model.trainings[seed]["history"][-1]["retain"] for seed in seeds)
            wanted = statistics.fmean(report.targets[seed] for seed in seeds)
            text += f": it reached {number(reached, report.higher)}{unit(report)} on the validation split, and the target is "
            text += f"{number(wanted, report.higher)}{unit(report)}"
        limits.append(text)
        points = [p for p in model.worst.get(report.headline, Stat()).points if p.seed in model.censored]
        if points:
            attacked.append(f"{_say(Stat(tuple(points)), report)} of {_name(model)}")
    text = f"{'. '.join(map(_sentence, limits))}."
    if not attacked:
        return text
    measured = "accuracy" if report.higher else "loss"
    return (
        f"{text} The forget {measured} after the attack, {_join(attacked)}, is therefore no evidence of robustness. A model that "
        "is broken as a whole scores badly on the forget set too."
    )


def _in_seeds(model: ModelReport, report: Report) -> str:
    return "" if len(report.seeds) == 1 else f" in seed {', '.join(map(str, model.censored))}"


def _ratios(report: Report) -> str:
    both = [m for m in report.of("undo") if m.robustness and m.compute["flops"]]
    if not both:
        reasons = {reason for m in report.of("undo") for reason in m.robustness.missing.values()}
        attacked = any(m.worst for m in report.models)
        return f"R is not given: {_join(sorted(reasons))}." if reasons and attacked else ""
    parts = [
        f"α = {m.alpha:g}: R = {ratio(m.robustness.mean)} at {ratio(m.compute['flops'].mean)} of data filtering's FLOPs"
        for m in sorted({both[0].name: both[0], both[-1].name: both[-1]}.values(), key=lambda m: m.alpha or 0.0)
    ]
    return f"On the scale from unlearn only (R = 0) to data filtering (R = 1): {'; '.join(parts)}."


def _limits(report: Report) -> str:
    seeds = len(report.seeds)
    text = (
        "There is one seed, so differences between seeds are unknown."
        if seeds == 1
        else f"Values are means over {seeds} seeds."
    )
    if len(report.rates) == 1:
        return f"{text} Only one learning rate was tried, so a stronger attack may exist."
    at_end = [_name(m) for m in report.models if m.at_end_of_grid]
    if at_end:
        text += f" The worst rate of {_join(at_end)} lies at an end of the grid, so a stronger attack may exist."
    return text


def _next(report: Report) -> str:
    """Says what to change where a student did not recover or the worst learning rate is at an end of the grid."""
    steps = []
    if short := [model for model in report.models if model.censored and model.kind in STUDENTS]:
        lower = " or lower noise.alphas" if any(model.alpha for model in short) else ""
        steps.append(f"raise distill.train.steps{lower}, so that the student{'s'[: len(short) > 1]} can recover")
    if len(report.rates) == 1:
        steps.append("try more learning rates (relearn.rates)")
    elif any(model.at_end_of_grid for model in report.models):
        steps.append("add learning rates beyond the end of the grid (relearn.rates), or let it grow (relearn.extend)")
    return f'What to try next: {"; ".join(steps)}. See docs/guides/report.md, "What to try next".' if steps else ""


def _name(model: ModelReport) -> str:
    named = {"original": "the original model", "unlearn": "the unlearn-only model", "random": "the random student"}
    return named.get(model.kind, model.label)


def _say(stat: Stat, report: Report) -> str:
    text = number(stat.mean, report.higher)
    return text if text == "diverged" else text + unit(report)


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _sentence(text: str) -> str:
    """The text with a capital if it begins with a phrase of this report; the name of a checkpoint stays as it is."""
    phrases = ("the ", *(label for label in LABELS.values() if " " in label))  # a checkpoint's name has no space
    return _upper(text) if text.startswith(phrases) else text


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
