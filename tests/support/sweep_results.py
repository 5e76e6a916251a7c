"""Results of the shape that runs leave, with numbers that a formula gives: for the report over several runs."""

import math
from typing import Any

STEPS = [0, 20, 40, 100, 200]
RATES = [1e-3, 2e-3, 4e-3]
SPEED = {"unlearn": 12.0, "filter": 400.0, "oracle": 40.0, "oracle-random": 300.0, "random": 330.0, "gated": 350.0}


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 500}


def relearned(pace: float, step: int, rate: float, loss: bool) -> float:
    """Forget performance after an attack on a model that resists for about ``pace`` steps; the middle rate is the worst."""
    got = 0.02 + 0.95 * (1 - math.exp(-step / pace * {1e-3: 0.5, 2e-3: 1.0, 4e-3: 0.8}[rate]))
    return 6 - 4 * got if loss else got


def attacked(name: str, pace: float, loss: bool = False, rates: list[float] | None = None) -> dict[str, Any]:
    curves = [
        {
            "rate": rate,
            "stage": f"relearn-{name}-{rate:g}",
            "forget": [score(relearned(pace, step, rate, loss)) for step in STEPS],
            "retain": [score((2 + 0.002 * step if loss else 0.93 - 0.0006 * step) + 10 * rate) for step in STEPS],
        }
        for rate in rates or RATES
    ]
    return {"rates": rates or RATES, "steps": STEPS, "extended": False, "worst_at_end_of_grid": False, "curves": curves}


def training(steps: int, reached: bool = True, labelled: int | None = None, unlearning: int = 0) -> dict[str, Any]:
    stop = {"stop_step": steps, "stop_tokens": 1000 * steps, "stop_flops": 4e9 * steps} if reached else {}
    return {
        "steps": steps,
        "tokens": 1000 * steps,
        "flops": 4e9 * steps,
        "seconds": 60.0,
        "limit_reached": not reached,
        "unlearning_steps": unlearning,
        "stop_step": None,
        "stop_tokens": None,
        "stop_flops": None,
        **stop,
        "labelled_forget_tokens": labelled,
        "labelled_retain_tokens": labelled,
        "peak_bytes": 1 << 20,
        "history": [{"step": step, "retain": 0.9 * step / steps} for step in range(0, steps + 1, steps // 5)],
    }


def results(
    name: str,
    seed: int = 0,
    method: str = "maxent",
    robust: str = "none",
    strength: float = 1.0,
    alphas: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8),
    labelled: int = 30_000,
    loss: bool = False,
    oracles: bool = True,
    censored: tuple[float, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """The results of one run; ``strength`` multiplies how long the models resist, and with it tells methods apart."""
    shift = 0.01 * (seed - 1)

    def model(kind: str, alpha: float | None = None, **parts: Any) -> dict[str, Any]:
        label = kind if alpha is None else f"undo-{alpha:g}"
        own = 1.0 if kind in ("filter", "oracle", "oracle-random") else strength
        pace = own * (1 + 0.05 * (seed - 1)) * (SPEED.get(kind) or 12 * math.exp(4 * (alpha or 0)))
        retain, forget = (0.95, 0.97) if kind == "original" else (0.92 - 0.02 * (alpha or 0) - 0.02 * (1 - own), 0.02)
        metrics = {"retain": score((2.1 if loss else retain) + shift), "forget": score((6 - 4 * forget) if loss else forget)}
        attack = None if kind == "original" else attacked(f"{name}-{label}-{seed}", pace, loss)
        return {
            "name": label,
            "kind": kind,
            "alpha": alpha,
            "stage": f"{kind}-{name}-{label}-{seed}",
            "metrics": metrics,
            "training": None,
            "attack": attack,
            **parts,
        }

    models = [model("original", training=training(1200)), model("unlearn", training=training(60, False, labelled))]
    models += [
        model("undo", alpha, training=training(int(100 + 800 * alpha + 20 * seed), alpha not in censored, labelled, 60))
        for alpha in alphas
    ]
    models += [
        model("random", training=training(900 + 10 * seed, labelled=labelled, unlearning=60)),
        model("filter", training=training(1000)),
    ]
    if oracles:
        models += [model("oracle", training=training(200)), model("oracle-random", training=training(200))]
    config = {"name": name, "seed": seed, "output": "runs/x", "noise": {"alphas": list(alphas), **settings.pop("noise", {})}}
    config |= {"unlearn": {"method": method, "robust": robust, "rows": labelled}, **settings}
    return {
        "format": 1,
        "name": name,
        "seed": seed,
        "command": f"undo sweep {name}.yaml",
        "versions": {"torch": "2"},
        "machine": {"device": "a machine"},
        "config": config,
        "metric": {
            "kind": "loss" if loss else "accuracy",
            "headline_step": 100,
            "retain_target": 2.3 if loss else 0.87,
            "eval_splits": {"test_forget": 500},
        },
        "models": models,
    }
