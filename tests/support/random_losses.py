"""Random calls of the losses over the vocabulary: the C++ kernels against the reference in float64."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import undo_kernels
from random_draws import DTYPES, bits
from rounding import EXPONENTIAL, assert_as_exact_as, compare_lazily, gamma, probability_error, unit
from undo_kernels import ops
from vocab_losses import logits

KINDS = ("forward", "reverse", "jsd", "cross_entropy", "lse", "uniform", "bucket", "renormalize")
DENSE, SPARSE = KINDS[:3], KINDS[6:]
TOKENS = (0, 1, 1, 2, 3, 5, 7, 13, 15, 16, 17, 31, 32, 33, 47, 97)
ENTRIES = (1, 2, 3, 17, 64, 65, 127, 128, 129, 257, 509, 1021, 2311)
WIDTHS = (1, 2, 3, 7, 16, 31, 32, 33, 64, 96, 97)
VALUES = ("normal", "normal", "peaked", "near", "tiny", "subnormal", "zero", "suppressed", "NaN")
PRODUCTS = 150_000  # most products of a call, so that it takes milliseconds
NARROW = 0.01  # of a gradient that is rounded to 16 bits between its products


@dataclass
class Loss:
    """One call: ``function(*tensors in order, **options)``; the names say which tensors have gradients.

    ``shape``: scale, softcap and temperature of the student's logits.
    """

    function: Any
    student: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    prefix: str = ""

    def run(self, student, convert=lambda tensor: tensor):
        """Returns the loss and the gradients of the student's tensors."""
        leaves = {name: tensor.requires_grad_() for name, tensor in student.items()}
        named = {f"{self.prefix}{name}": tensor for name, tensor in leaves.items() if name == "bias"}
        first = [tensor for name, tensor in leaves.items() if name != "bias"]
        others = [convert(tensor) for tensor in self.others.values()]
        options = {name: convert(v) if isinstance(v, torch.Tensor) else v for name, v in self.options.items()}
        loss = self.function(*first, *others, **named, **options)
        gradients = torch.autograd.grad((1.5 * loss).sum(), list(leaves.values()), allow_unused=True)
        return loss.detach(), dict(zip(leaves, gradients, strict=True))


def drawn(d):
    """Returns the loss of a draw."""
    kind, tokens, width = d.choose("loss", KINDS), d.choose("tokens", TOKENS), d.choose("width", WIDTHS)
    entries = d.choose("entries", [v for v in ENTRIES if v * max(tokens, 1) * width <= PRODUCTS or v == 1])
    leading = (tokens,) if tokens % 2 or d.often(0.5, "two dimensions of tokens") else (2, tokens // 2)
    dtype, values = d.choose("dtype", DTYPES), d.choose("values", VALUES)
    given = kind in (*DENSE, *SPARSE) and d.often(0.3, "given logits")
    size = entries - 2 if entries > 3 and d.often(0.2, "padding") else entries
    counted = _mask(d, tokens)
    temperature = d.choose("temperature", (1.0, 1.0, 0.7, 3.0))
    call = Loss(
        None, {}, size=size, shape={"temperature": temperature}, prefix="student_" if kind in DENSE and not given else ""
    )
    call.options |= {"temperature": temperature, "vocab_size": None if size == entries else size}
    call.options["plan"] = d.choose("plan", ("chunk", "chunk", "recompute", "auto"))
    call.options["workspace_bytes"] = d.choose("workspace_bytes", (None, None, 1 << 21, 1 << 24))
    if kind != "lse":
        call.options |= {
            "mask": None if counted is None else d.placed("mask", counted.view(leading)),
            "reduction": d.choose("reduction", ("mean", "sum", "none")),
            "token_weight": d.spoiled(d.shares(leading), "zero", 0.3) if d.often(0.3, "token weights") else None,
        }

    def matrices(wide, kind_of):
        spread = {"peaked": 10.0, "tiny": 1e-3}.get(values, 1.0)
        pair = [d.normal(tokens, wide) * spread, d.normal(entries, wide) / math.sqrt(wide)]
        # Only given logits are infinite: in a head, whether 0 or a little multiplies an infinity is up to rounding.
        if values in ("subnormal", "zero", "NaN") or (values == "suppressed" and given):
            pair = [d.spoiled(t, values, 0.2 if values in ("subnormal", "zero") else 0.3 / (t.numel() + 1)) for t in pair]
        return [t.to(kind_of) for t in pair]

    hidden, weight = matrices(entries if given else width, dtype)
    call.student = {"hidden": hidden} if given else {"hidden": hidden, "weight": weight}
    if not given:
        call.shape |= {
            "scale": d.choose("scale", (1.0, 1.0, 0.3, -2.0)),
            "softcap": d.choose("softcap", (None, None, 3.0, 30.0)),
        }
        call.options |= {f"{call.prefix}{name}": call.shape[name] for name in ("scale", "softcap")}
        if d.often(0.3, "bias"):
            bias = d.normal(entries)
            if call.shape["scale"] > 0 and d.often(0.3, "of -inf in part"):
                bias[1:] = torch.where(d.shares(entries - 1) < 0.3, -math.inf, bias[1:])
            call.student["bias"] = bias.to(d.choose("bias's dtype", (torch.float32, dtype)))
    if kind in DENSE:
        near = values == "near"
        teacher = (
            [hidden + 1e-3 * d.normal(*hidden.shape), weight]
            if near
            else matrices(entries if given else d.choose("teacher's width", WIDTHS), d.choose("teacher's dtype", DTYPES))
        )
        call.others = {"hidden": teacher[0]} if given else {"hidden": teacher[0], "weight": teacher[1]}
        call.options |= {"divergence": kind, "beta": d.choose("beta", (0.5, 0.01, 0.9))}
        # With a NaN in the teacher's head no token has a divergence, and none of the labels' losses is promised.
        if values != "NaN" and d.often(0.3, "labels"):
            call.options |= {"labels": _labels(d, tokens, size).view(leading), "label_weight": 0.5}
        if given and d.often(0.2, "in place"):
            call.options["inplace_grad"] = True
        call.function = ops.kl_div if given else ops.linear_kl_div
    elif kind in SPARSE:
        known = min(d.choose("known", (1, 3, 8)), size)
        indices = d.shares(tokens, size).argsort(-1)[:, :known].contiguous()
        share = d.shares(tokens, known) + 0.01
        indices[d.shares(tokens, known) < 0.2] = -1
        call.others = {"indices": indices, "logprobs": (0.9 * share / share.sum(-1, keepdim=True)).log()}
        call.options["tail"] = kind
        call.function = ops.sparse_kl_div if given else ops.linear_sparse_kl_div
    else:
        call.function = {"cross_entropy": ops.linear_cross_entropy, "lse": ops.linear_lse, "uniform": ops.linear_uniform_kl}[
            kind
        ]
        call.others = {"labels": _labels(d, tokens, size)} if kind == "cross_entropy" else {}
    if counted is not None and "mask" in call.options and d.often(0.5, "NaN where masked"):
        for tensors in (
            (call.others,) if "labels" in call.options else (call.student, call.others)
        ):  # labels count without the mask
            if "hidden" in tensors:
                tensors["hidden"][~counted] = math.nan
    for tensors in (call.student, call.others):
        for name, tensor in tensors.items():
            shaped = tensor if name in ("weight", "bias") else tensor.reshape(*leading, *tensor.shape[1:])
            tensors[name] = d.placed(name, shaped)
    return call


def _mask(d, tokens):
    mask = d.choose("mask", (None, "all", "none", "some"))
    share = {"all": 1.0, "none": 0.0, "some": 0.5}
    return None if mask is None else d.shares(tokens) < share[mask]


def _labels(d, tokens, size):
    labels = torch.randint(0, size, (tokens,), generator=d.generator)
    return torch.where(d.shares(tokens) < 0.3, -100, labels)


def check(d):
    """Makes a draw's call on the C++ backend; fails where it errs more than rounding and plain torch do, or writes to an input."""
    call = drawn(d)
    before = {name: bits(tensor).clone() for name, tensor in call.student.items()}
    copies = {name: tensor.clone() for name, tensor in call.student.items()}
    with undo_kernels.backend("reference"):
        exact = {name: tensor.double() for name, tensor in call.student.items()}
        want = call.run(exact, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    with undo_kernels.backend("cpu"):
        got = call.run(call.student)
    for name, tensor in call.student.items():
        assert "inplace_grad" in call.options or torch.equal(bits(tensor), before[name]), f"{name} was written to"
    floor, sizes = _bounds(call)
    narrow = any(tensor.dtype != torch.float32 for tensor in call.student.values())

    def compare(plain):
        assert_as_exact_as(got[0], plain[0], want[0], floor, "loss", scale=sizes["loss"])
        for name, gradient in got[1].items():
            exactly = want[1][name]
            if exactly is None:
                assert gradient is None or not gradient.any(), name
                continue
            assert_as_exact_as(
                gradient, plain[1][name], exactly, NARROW if narrow else floor, f"gradient of {name}", scale=1.5 * sizes[name]
            )

    def run_plain():
        with undo_kernels.backend("reference"):
            return call.run(copies)

    compare_lazily(compare, want, run_plain)


def _bounds(call):
    """Returns the relative error that rounding may cause, and norms of what the loss and each gradient are sums of."""
    finite = lambda t: t.detach().double().nan_to_num(0, 0, 0).flatten(0, -2)  # noqa: E731
    temperature = call.shape["temperature"]
    heads = [[finite(call.student[n]) for n in ("hidden", "weight") if n in call.student]]
    if "divergence" in call.options:
        heads.append([finite(tensor) for tensor in call.others.values()])
    zs = [head[0] / temperature if len(head) == 1 else None for head in heads]
    if zs[0] is None:
        bias = None if "bias" not in call.student else call.student["bias"].detach().double()
        zs = [logits(*heads[0], bias=bias, **call.shape), *(logits(*head, temperature=temperature) for head in heads[1:])]
        floor = max(probability_error(*head, call.size) for head in heads)
    else:
        largest = max((float(z.abs().max()) for z in zs if z.numel()), default=0.0)
        floor = gamma(call.size + 3 * EXPONENTIAL + 1) + 4 * unit() * largest
    zs = [z[:, : call.size] for z in zs]
    s, *t = (z.log_softmax(-1) for z in zs)
    terms = s.exp() + 1
    if t:
        ratio = (s - t[0]).nan_to_num(0, 0, 0).abs()
        terms = s.exp() * (1 + ratio + (s.exp() * ratio).sum(-1, keepdim=True)) + t[0].exp()
    factor = 1.0
    reach = factor * terms.nan_to_num(0).norm(dim=-1)  # of each token's gradient by its logits
    count = math.sqrt(max(len(reach), 1))
    sizes = {"loss": count, "bias": float(reach.sum()), "hidden": float(reach.norm())}
    if len(heads[0]) == 2:
        hidden, weight = heads[0]
        sizes["hidden"] = float(reach.norm() * weight.norm())
        sizes["weight"] = float((reach * hidden.norm(dim=-1)).sum())
    return floor, sizes
