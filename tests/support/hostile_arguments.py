"""Arguments of the public ops: right ones, and anything that a caller may pass by mistake."""

import inspect
import math
import random

import torch
from random_draws import bits
from torch import nn
from undo_kernels import LinearCrossEntropyLoss, LinearKLDivLoss, ops

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64,
)  # fmt: skip
SHAPES = (
    (),
    (0,),
    (1,),
    (3,),
    (4,),
    (8,),
    (11,),
    (3, 1),
    (3, 8),
    (4, 8),
    (3, 11),
    (11, 8),
    (11, 7),
    (0, 8),
    (3, 0),
    (11, 0),
    (1, 3, 8),
    (3, 2),
)
PLAIN = (
    None, True, False, 0, 1, -1, 2, 3, 7, -100, 2.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, 2**31, 2**63 - 1, 2**63, 2**64,
    -(2**63) - 1, 10**400, -(10**5000), 1j, "", "a", "mean", "jsd", "\ud800", "layers:0-99999999", "not not a", b"x", [], (), {}, [1, 2],
    (3, -8), (2**40, 2**40), ("a", "b"), {"a": 1}, {1: torch.ones(2, 2)}, object(), print, torch.float32, torch.device("meta"), nn.Linear(2, 2),
)  # fmt: skip


def tensor(r):
    """Returns a tensor of any dtype, shape, layout and device."""
    g = torch.Generator().manual_seed(r.randrange(2**31))
    value = (4 * torch.randn(r.choice(SHAPES), generator=g)).to(r.choice(DTYPES if r.random() < 0.5 else DTYPES[:1]))
    way = r.choice(("plain", "plain", "plain", "meta", "sparse", "rows", "nan", "gradient", "expanded", "negative", "nested"))
    if way == "meta":
        return value.to("meta")
    if way == "sparse" and value.ndim and value.dtype in DTYPES[:4]:
        return value.to_sparse()
    if way == "rows" and value.ndim == 2 and value.dtype in DTYPES[:2]:
        return value.to_sparse_csr()
    if way == "nan" and value.is_floating_point():
        return value * math.nan if value.dtype != torch.float8_e4m3fn else value
    if way == "gradient" and value.is_floating_point():
        return value.requires_grad_()
    if way == "expanded":
        return value[..., None].expand(*value.shape, 8)
    if way == "negative" and value.dtype == torch.float32:
        return torch.complex(value, value).conj().imag
    if way == "nested" and value.ndim and value.dtype == torch.float32:
        return torch.nested.nested_tensor([value, value])
    return value


def good(r):
    """Returns an op and right arguments for it, with few tokens and entries."""
    g = torch.Generator().manual_seed(r.randrange(2**31))
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hidden, weight = make(3, 8).requires_grad_(r.random() < 0.5), make(11, 8)
    teacher = {"teacher_hidden": make(3, 8), "teacher_weight": make(11, 8)}
    student = {"student_hidden": hidden, "student_weight": weight}
    labels, logits = torch.tensor([1, -100, 10]), make(3, 11).requires_grad_()
    known = {"teacher_indices": torch.tensor([[0, 1], [1, 2], [3, -1]]), "teacher_logprobs": torch.full((3, 2), -1.0)}
    return r.choice(
        (
            (ops.linear_kl_div, student | teacher | {"labels": labels, "label_weight": 0.5}),
            (ops.kl_div, {"student_logits": logits, "teacher_logits": make(3, 11), "divergence": "jsd"}),
            (ops.linear_cross_entropy, {"hidden": hidden, "weight": weight, "labels": labels}),
            (ops.linear_lse, {"hidden": hidden, "weight": weight}),
            (ops.linear_uniform_kl, {"hidden": hidden, "weight": weight}),
            (ops.linear_sparse_kl_div, {"hidden": hidden, "weight": weight} | known),
            (ops.sparse_kl_div, {"student_logits": logits} | known),
            (ops.rmu_loss, {"hidden": hidden, "target": make(8)}),
            (ops.misdirection, {"width": 8, "seed": 1}),
            (ops.noise_, {"tensors": {"a.0.w": make(3, 4), "b": make(5)}, "alpha": 0.5, "beta": 0.1, "seed": 3}),
            (ops.replay, {"name": "w", "shape": (3, 4), "seed": 1}),
            (ops.NoiseRule, {"match": "*.mlp.*"}),
            (ops.explain, {"op": "linear_lse", "shapes": {"hidden": (3, 8), "weight": (11, 8)}, "dtype": torch.float32, "device": "cpu"}),
            (_module(LinearKLDivLoss), student | teacher | {"divergence": "reverse"}),
            (_module(LinearCrossEntropyLoss), {"hidden": hidden, "weight": weight, "labels": labels}),
        )
    )  # fmt: skip


def _module(kind):
    """Returns the construction and the call of a loss as one function of all their arguments."""
    options, inputs = (list(inspect.signature(f).parameters.values())[1:] for f in (kind.__init__, kind.forward))

    def call(**arguments):
        loss = kind(**{p.name: arguments.pop(p.name) for p in options if p.name in arguments})
        return loss(**arguments)

    call.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in (*options, *inputs)])
    call.__name__ = kind.__name__
    return call


def within(value):
    """Yields the tensors that an argument holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from within(one)


def kept(arguments):
    """Returns the tensors among the arguments whose bytes can be read, and their bytes."""
    readable = [t for t in within(arguments) if t.layout == torch.strided and not t.is_meta and not t.is_nested]
    return [(t, bits(t.resolve_neg()).clone()) for t in readable]


def attempt(seed):
    """Makes one call with one or two wrong arguments; returns whether it was refused, by a ``ValueError`` or ``TypeError`` that names one."""
    r = random.Random(seed)
    function, arguments = good(r)
    names = list(inspect.signature(function).parameters)
    changed = r.sample(names, min(len(names), r.choice((1, 1, 1, 2))))
    for name in changed:
        arguments[name] = tensor(r) if r.random() < 0.5 else r.choice(PLAIN)
        if name == "toward" and callable(arguments[name]):  # whose own errors are the caller's
            arguments[name] = None
        if name == "tensors" and r.random() < 0.5:
            arguments[name] = {"a": tensor(r), r.choice(("b", "", 5, "\ud800")): tensor(r)}
    before = kept(arguments)
    what = f"seed {seed}: {function.__name__} with {', '.join(f'{name}={_short(arguments[name])}' for name in changed)}"
    try:
        result = function(**arguments)
        if isinstance(result, torch.Tensor) and result.requires_grad and not result.is_meta:
            result.float().sum().backward()
        refused = False
    except (ValueError, TypeError) as error:
        said = str(error)
        assert any(said.startswith(name) for name in names), f"{what}: names no argument: {said}"
        assert "\n" not in said and " wanted " in said, f"{what}: {said}"
        refused = True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if refused or function is not ops.noise_:
        for tensor_before, bytes_before in before:
            assert torch.equal(bits(tensor_before.resolve_neg()), bytes_before), f"{what}: an input was changed"
    return refused


def _short(value):
    if isinstance(value, torch.Tensor):
        return (
            f"tensor({tuple(value.shape) if not value.is_nested else 'nested'}, {value.dtype}, {value.layout}, {value.device})"
        )
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return (
        repr(value)[:80]
        if not isinstance(value, dict)
        else str({name: _short(one) for name, one in value.items()}).encode(errors="replace")
    )
