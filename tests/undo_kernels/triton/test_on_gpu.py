"""What only a GPU can show: its own bits and sizes, no waiting, graphs, memory."""

import math

import pytest
import torch
from rounding import gamma
from triton_problems import DEVICE, error, moved, problem
from undo_kernels.triton import vocab_loss
from undo_kernels.triton.plan import gpu_plan
from undo_kernels.triton.products import Workspace

from undo_core import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU here")]


def heads(rows, vocabulary, width, dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)

    student = [normal(rows, width).requires_grad_(), normal(vocabulary, width, scale=2 / math.sqrt(width)).requires_grad_()]
    return [*student, normal(rows, width), normal(vocabulary, width, scale=2 / math.sqrt(width))]


def oracle(student, student_weight, teacher, teacher_weight, softcap=None):
    """Loss and gradients in float64, plain."""
    leaves = [t.detach().double().requires_grad_() for t in (student, student_weight)]
    z_s, z_t = leaves[0] @ leaves[1].T, teacher.double() @ teacher_weight.double().T
    if softcap is not None:
        z_s, z_t = (softcap * torch.tanh(z / softcap) for z in (z_s, z_t))
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    value = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return value.detach(), *torch.autograd.grad(value, leaves)


def step(inputs, **options):
    value = ops.linear_kl_div(*inputs, **options)
    return value.detach(), *torch.autograd.grad(value, inputs[:2])


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [320, 768, 2304])
def test_losses_at_the_published_widths(width, dtype, plan):
    """Whole tiles and ends of them, with tiles of their real size."""
    inputs = heads(700, 5001, width, dtype)
    got, wanted = step(inputs, plan=plan, student_softcap=30.0, teacher_softcap=30.0), oracle(*inputs, softcap=30.0)
    bounds = (1e-5, 1e-4) if dtype == torch.float32 else (1e-3, 1e-2)
    for value, expected, bound in zip(got, wanted, (bounds[0], bounds[1], bounds[1]), strict=True):
        assert error(value, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("law", ["xavier_uniform", "xavier_normal"])
def test_noise_has_the_cpus_bits(law, dtype):
    shapes = {"embed.weight": (3001, 320), "mlp.weight": (320, 1283), "norm.weight": (320,)}
    here = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for name, shape in shapes.items()}
    there = {name: tensor.to(DEVICE) for name, tensor in here.items()}
    for tensors in (here, there):
        ops.noise_(tensors, alpha=0.6, beta=0.1, seed=7, law=law)
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name].cpu()), name


def test_row_times_vocabulary_beyond_32_bits():
    rows, vocabulary = 8400, 256_000
    assert rows * vocabulary > 2**31
    logits = [torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for z in logits:
        z[-5:] = torch.randn(5, vocabulary, device=DEVICE) * 3
    value = ops.kl_div(*logits, reduction="none")
    log_s, log_t = (z[-5:].double().log_softmax(-1) for z in logits)
    assert error(value[-5:], (log_t.exp() * (log_t - log_s)).sum(-1)) < 1e-3
    assert not value[:-5].any()


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_nothing_waits_for_the_gpu(plan):
    inputs, mask = heads(600, 4000, 128), torch.arange(600, device=DEVICE) % 3 == 0
    options = {"mask": mask, "max_counted": 200, "plan": plan}
    wanted = step(inputs, **options)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_a_graph_replays_on_new_inputs(plan):
    inputs, others = heads(512, 4000, 128), [t.detach().flip(0) for t in heads(512, 4000, 128)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(inputs, plan=plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, plan=plan)
    with torch.no_grad():
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
    graph.replay()
    for a, b in zip(captured, step(inputs, plan=plan), strict=True):
        assert torch.equal(a, b)


def test_compiles_to_one_graph():
    inputs = heads(300, 4000, 64)
    torch.compiler.reset()
    loss_of = torch.compile(lambda *given: ops.linear_kl_div(*given), fullgraph=True)
    # The op is the same; the mean of 300 divergences, none of them negative, may be added in another order.
    assert float(loss_of(*inputs)) == pytest.approx(float(ops.linear_kl_div(*inputs)), rel=2 * gamma(300 + 2))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_memory_is_what_the_plan_says(plan):
    p = moved(problem("forward", rows=4096, vocabulary=32_000, widths=(512, 512), dtype=torch.bfloat16, plan=plan))
    allowed = gpu_plan(p).workspace_bytes
    vocab_loss.run(p, Workspace(DEVICE))  # compiles; the library's own workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = vocab_loss.run(p, Workspace(DEVICE))
    torch.cuda.synchronize()
    outputs = sum(t.numel() * t.element_size() for t in result)
    extra = torch.cuda.max_memory_allocated() - before - outputs
    assert extra <= allowed + 4096 * 200 + (8 << 20), "beyond the workspace, a few floats a token"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one():
    other = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in heads(300, 4000, 64)]
    for value, expected in zip(step(other), oracle(*other), strict=True):
        assert value.device == torch.device("cuda:1") and error(value, expected) < 1e-2
