"""Losses on a head that is sharded by vocabulary entries, on several processes: ``python vocabulary_parallel.py WORLD OUT CASES``.

It imports everything once, forks so many processes, and each writes to the file OUT.RANK, as JSON, what each case said on it: "" where
it passed. CASES is essential, long or triton.
"""

import functools
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from gloo_processes import forked
from vocabulary_parallel_checks import (
    CPP,
    KINDS,
    OPTIONS,
    PLAIN,
    Processes,
    agree,
    dense,
    few_entries,
    labels_beside,
    near_agreement,
    peaked,
    recomputed,
    refused,
    several_chunks,
    single,
    sixteen_bits,
    traffic,
)  # fmt: skip

TRITON = (("triton", "recompute"), ("triton", "chunk"))  # the interpreter, where there is no GPU


def triton_cases():
    """Every target in Triton: far slower under the interpreter, so on a small vocabulary and few tokens."""
    found = {}
    for where, plan in TRITON:
        for number, kind in enumerate(KINDS):
            found[f"{where} {plan} {kind}"] = functools.partial(
                dense, where=where, plan=plan, kind=kind, reduction=("mean", "none", "sum")[number], options=OPTIONS[number]
            )
        names = ("cross_entropy", "uniform", "lse") + (("bucket", "renormalize") if plan == "chunk" else ())
        for name in names:
            found[f"{where} {plan} {name}"] = functools.partial(single, where=where, plan=plan, name=name, reduction="mean")
        found[f"{where} {plan} labels beside"] = functools.partial(labels_beside, where=where, plan=plan)
        found[f"{where} {plan} few entries"] = functools.partial(few_entries, where=where, plan=plan)
        found[f"{where} {plan} 16 bits"] = functools.partial(sixteen_bits, where=where, plan=plan)
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{where} {plan} near agreement {dtype}"] = functools.partial(
                near_agreement, where=where, plan=plan, kind="forward", dtype=dtype, tokens=12, vocabulary=307
            )
        found[f"{where} {plan} traffic"] = functools.partial(traffic, where=where, plan=plan)
    return found


def essential_cases():
    found = {}
    for where, plan in (CPP, PLAIN):
        for kind in KINDS:
            found[f"{where} {kind} mean"] = functools.partial(
                dense, where=where, plan=plan, kind=kind, reduction="mean", options={}
            )
        for name in ("cross_entropy", "uniform", "lse", "bucket", "renormalize"):
            found[f"{where} {name}"] = functools.partial(single, where=where, plan=plan, name=name, reduction="mean")
        found[f"{where} none, shaped"] = functools.partial(
            dense, where=where, plan=plan, kind="forward", reduction="none", options=OPTIONS[1]
        )
        found[f"{where} padding"] = functools.partial(
            dense, where=where, plan=plan, kind="jsd", reduction="mean", options=OPTIONS[2]
        )
        found[f"{where} near agreement"] = functools.partial(
            near_agreement, where=where, plan=plan, kind="forward", dtype=torch.float32
        )
        found[f"{where} peaked"] = functools.partial(peaked, where=where, plan=plan)
        found[f"{where} labels beside"] = functools.partial(labels_beside, where=where, plan=plan)
        found[f"{where} traffic"] = functools.partial(traffic, where=where, plan=plan)
        found[f"{where} few entries"] = functools.partial(few_entries, where=where, plan=plan)
    for plan, name in (("recompute", "cross_entropy"), ("chunk", "bucket")):
        found[f"triton {name}"] = functools.partial(single, where="triton", plan=plan, name=name, reduction="mean")
    found["triton reverse"] = functools.partial(
        dense, where="triton", plan="chunk", kind="reverse", reduction="mean", options=OPTIONS[2]
    )
    found["float64"] = functools.partial(
        dense, where="reference", plan="direct", kind="reverse", reduction="mean", options=OPTIONS[1], dtype=torch.float64
    )
    found["cpu 16 bits"] = functools.partial(sixteen_bits, where="cpu", plan="recompute")
    found |= {"several chunks": several_chunks, "agree": agree, "recomputed": recomputed, "refused": refused}
    return found


def long_cases():
    found = {}
    for where, plan in (CPP, ("cpu", "chunk"), PLAIN):
        for kind in KINDS:
            for reduction in ("mean", "sum", "none"):
                for number, options in enumerate(OPTIONS):
                    found[f"{where} {plan} {kind} {reduction} {number}"] = functools.partial(
                        dense,
                        where=where,
                        plan=plan,
                        kind=kind,
                        reduction=reduction,
                        options=options,
                    )
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                found[f"{where} {plan} near agreement {kind} {dtype}"] = functools.partial(
                    near_agreement, where=where, plan=plan, kind=kind, dtype=dtype
                )
        for name in ("cross_entropy", "uniform", "lse", "bucket", "renormalize"):
            if (plan, name) != ("chunk", "lse"):
                found[f"{where} {plan} {name} none"] = functools.partial(
                    single, where=where, plan=plan, name=name, reduction="none"
                )
    return found


def cases(which):
    return {"essential": essential_cases, "long": long_cases, "triton": triton_cases}[which]()


def work(mesh, which, out):
    p, said = Processes(mesh), {}
    for name, case in cases(which).items():
        try:
            said[name] = "not run, because a case before it failed and the processes no longer wait for each other"
            if not any(said[other] for other in said if other != name):
                case(p)
                said[name] = ""
        except Exception:  # written to the file of results, where the test asserts that there is none
            said[name] = traceback.format_exc(limit=-6)
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(said))


def main(world, out, which):
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreter import replace_language_once

        replace_language_once()
    sys.exit(forked(world, work, which, out))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
