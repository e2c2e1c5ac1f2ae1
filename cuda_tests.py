"""A section for test_mokd.py: what can be shown of CUDA on a machine that has no GPU."""
import os
import traceback
import warnings

import pytest
import torch
import torch.cuda.amp.common
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval_linear
import mokd
from test_mokd import CNN, PAIR, SMALL, VIT, config, now_of, views_of

# --------------------------------------------------------------------- CUDA, on a machine without a GPU

class FakeGPU(TorchDispatchMode):
    """Tensors of cuda:0 are fake: they have a shape, a type and a device, but no values. An operation on
    tensors of two devices raises. A wait for the device is noted with its line; a count that is waited for is
    0, any other value 1 (so all is finite), and a search for what is not zero finds nothing. Tensors of the
    CPU are real. To be entered inside FakeTensorMode."""
    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = any(isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        if func is torch.ops.aten._local_scalar_dense.default and on_gpu:   # item(), bool(), float()
            with unset_fake_temporarily():
                return self.read(args[0]).item()
        if func is torch.ops.aten._to_copy.default and device is not None and device.type == "cpu" and on_gpu:
            with unset_fake_temporarily():
                return self.read(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if func is torch.ops.aten.nonzero.default and on_gpu:
            self.wait()
            return torch.empty(0, args[0].dim(), dtype=torch.long, device=args[0].device)
        if on_gpu or device is not None and device.type == "cuda":
            if func is torch.ops.aten._to_copy.default and not on_gpu and not kwargs.get("non_blocking"):
                self.wait()
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def read(self, x):   # x, as if it came to the CPU
        self.wait()
        return (torch.zeros if x.dtype == torch.long else torch.ones)(x.shape, dtype=x.dtype)

    def wait(self):
        """Note the innermost line of this project, but for this class's own."""
        own, folder = ("wait", "read", "__torch_dispatch__"), os.path.dirname(mokd.__file__)
        frames = [f for f in traceback.extract_stack() if os.path.dirname(f.filename) == folder]
        last = [f for f in frames if f.name not in own][-1]
        self.waits.append(f"{os.path.basename(last.filename)}:{last.lineno} {last.line}")


def walk_backward(loss, *_, **__):
    """loss.backward() without torch's engine, which asks the driver for streams: nodes in the order of the
    graph, gradients of what was broadcast summed, all cast to their tensor's type, as the engine does."""
    order, seen, stack = [], {loss.grad_fn}, [(loss.grad_fn, iter(loss.grad_fn.next_functions))]
    while stack:
        node, edges = stack[-1]
        for after, _ in edges:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append((after, iter(after.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    grads = {(loss.grad_fn, 0): torch.ones_like(loss)}
    for node in reversed(order):
        if hasattr(node, "variable"):   # a leaf
            grad = grads.pop((node, 0), None)
            if grad is not None:
                node.variable.grad = grad if node.variable.grad is None else node.variable.grad + grad
            continue
        incoming = [grads.pop((node, i), None) for i in range(len(node._input_metadata))]
        if all(grad is None for grad in incoming):
            continue
        outgoing = node(*incoming) if callable(node) else node.apply(*incoming)   # or an autograd.Function
        outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
        for (after, i), grad in zip(node.next_functions, outgoing):
            if after is None or grad is None:
                continue
            like = after.variable if hasattr(after, "variable") else after._input_metadata[i]
            if grad.shape != like.shape or grad.dtype != like.dtype:
                grad = grad.sum_to_size(like.shape).to(like.dtype)
            grads[after, i] = grads[after, i] + grad if (after, i) in grads else grad


def move_real_tensors(net, device=None, **_):
    """net.to(device), of which torch makes a mess where some tensors of net are there already and fake."""
    for module in net.modules():
        for own in (module._parameters, module._buffers):
            for name, t in own.items():
                if t is not None and not isinstance(t, FakeTensor):
                    own[name] = t.detach().to(device)
                    if isinstance(t, nn.Parameter):
                        own[name] = nn.Parameter(own[name], t.requires_grad)
    return net


@pytest.fixture
def gpu(monkeypatch):
    """A FakeGPU, where cuda:0 may be used; .device is it."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch knows no CUDA")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: fake.read(x).tolist())   # torch's reads one by one
    monkeypatch.setattr(nn.Module, "to", move_real_tensors)
    monkeypatch.setattr(torch.Tensor, "backward", walk_backward)
    mokd.mean_and_std.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), FakeGPU() as fake:
        fake.device = torch.device("cuda", 0)
        yield fake
    mokd.mean_and_std.cache_clear()


def crops_of(cfg):
    g = torch.Generator().manual_seed(0)
    shapes = [(cfg.batch_size, n, size, size, 3) for n, size in (
        (2, cfg.global_size), (cfg.local_crops, cfg.local_size))]
    return [torch.randint(256, shape, generator=g, dtype=torch.uint8) for shape in shapes]


SMALLER_CNN = ["--arch2", "resnet34", "--model_kwargs2", *CNN]
SMALLER_VIT = ["--arch1", "vit_small", "--model_kwargs1", *VIT[:-2], "depth=1", "num_heads=2"]


@pytest.mark.parametrize("args", [
    [], ["--recipe", "release"], ["--search", "global", "--dtype", "fp16"], ["--losses", "sm"], SMALLER_CNN,
    [*SMALLER_VIT, "--recipe", "release", "--dtype", "fp16"]], ids=" ".join)
def test_a_step_on_cuda_stays_on_it_and_never_waits(args, gpu):
    """The whole of it: forward, search, losses, backward, update, momentum nets, centers; bf16 and fp16."""
    cfg = config(*args)
    cfg.dtype = "fp16" if "fp16" in args else "bf16"
    models = mokd.build_models(cfg, gpu.device)
    x = [v.to(gpu.device, memory_format=torch.channels_last) for v in views_of(cfg)]
    gpu.waits.clear()
    losses, logits = mokd.train_step(*models, x, cfg, now_of(cfg))
    assert gpu.waits == []

    half = torch.float16 if cfg.dtype == "fp16" else torch.bfloat16
    assert all(loss.device == gpu.device and loss.dtype == torch.float32 for loss in losses.values())
    assert {t.dtype for t in logits.values() if t is not None} == {half}
    for m in models:
        tensors, updated = [*m.params, *m.params_, *m.net.buffers(), *m.momentum_net.buffers()], 0
        for optimizer in m.optimizers:
            updated += len(optimizer.state)
            for state in optimizer.state.values():
                tensors += [v for v in state.values() if v is not None]
        assert all(t.device == gpu.device for t in tensors)
        assert updated == sum(p.requires_grad for p in m.params)   # all were given a gradient

def test_views_are_made_on_cuda_without_a_wait(gpu):
    """What happens to each image is drawn on the CPU, so which rows an operation is for is not read back."""
    cfg = config("--blur", 0.1, 2)
    mokd.mean_and_std(gpu.device)   # of which a copy is kept
    gpu.waits.clear()
    x = mokd.make_views(crops_of(cfg), cfg, gpu.device, 0)
    assert gpu.waits == [] and [v.shape for v in x] == [(16, 3, 32, 32), (16, 3, 16, 16)]
    assert all(v.device == gpu.device for v in x)


def test_a_wait_and_a_tensor_of_the_cpu_in_a_step_are_noticed(gpu, monkeypatch):
    cfg = config()
    cfg.dtype = "bf16"
    x = [v.to(gpu.device) for v in views_of(cfg)]
    models, real = mokd.build_models(cfg, gpu.device), mokd.cross_entropy
    now = now_of(cfg)

    def waiting(p, s, temp):
        return real(p, s, temp) / max(1.0, p.sum().item())

    def with_the_cpu(p, s, temp):
        return real(p * torch.ones(cfg.out_dim), s, temp)
    gpu.waits.clear()
    monkeypatch.setattr(mokd, "cross_entropy", waiting)
    mokd.train_step(*models, x, cfg, now)
    assert len(gpu.waits) > 4 and all("p.sum().item()" in line for line in gpu.waits)
    monkeypatch.setattr(mokd, "cross_entropy", with_the_cpu)
    with pytest.raises(RuntimeError, match="devices,? cuda:0.* cpu"):
        mokd.train_step(*models, x, cfg, now)


@pytest.mark.parametrize("program", ["mokd.py", "eval_linear.py", "eval_linear.py --finetune"])
def test_more_steps_on_cuda_bring_no_more_waits(program, gpu, monkeypatch, tmp_path):
    """Whole programs, with their loaders: they wait to log, to evaluate and to save, not in a step."""
    toy = mokd.get_data
    monkeypatch.setattr(mokd, "join_processes", lambda: (gpu.device, 0, 1))
    monkeypatch.setattr(mokd, "write", lambda value, path: None)   # there are no values
    monkeypatch.setattr(mokd, "memory_gb", lambda device: 0.0)
    mokd.mean_and_std(gpu.device)   # of which a copy is kept
    waits = []
    for steps in (1, 2):
        monkeypatch.setattr(mokd, "get_data", lambda cfg: [
            torch.utils.data.Subset(part, range(n)) for part, n in zip(toy(cfg), (8 * steps, 8))])
        gpu.waits.clear()
        common = ["--out", str(tmp_path / str(steps)), "--log_every", "99", "--dtype", "bf16"]
        common += ["--workers", "0"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            if program == "mokd.py":
                pair = [*SMALL, *PAIR, "--losses", "sm", "--local_crops", "0"]
                mokd.run(mokd.parse_args([*pair, *common]))
            else:
                eval_linear.run(eval_linear.parse([
                    "--arch", "vit_tiny", "--model_kwargs", *VIT, "--image_size", "32", "--data", "toy",
                    "--batch_size", "8", "--epochs", "1", "--lr", "0.1", *program.split()[1:], *common]))
        waits.append(sorted(gpu.waits))
    assert waits[0] == waits[1] != []


def test_features_on_cuda_bring_no_wait_for_a_batch(gpu):
    cfg = config()
    backbones = [m.momentum_net.backbone for m in mokd.build_models(cfg, gpu.device)]
    mokd.mean_and_std(gpu.device)   # of which a copy is kept
    waits = []
    for n in (8, 16):
        images = torch.utils.data.TensorDataset(*mokd.draw_toy(n, "train"))
        gpu.waits.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            features, labels = mokd.extract_features(backbones, mokd.EvalView(images, 32), gpu.device, 4,
                                                     dtype="bf16")
        waits.append(sorted(gpu.waits))
    assert [f.device for f in features] == [gpu.device] * 2 and labels.device == gpu.device
    assert waits[0] == waits[1]
