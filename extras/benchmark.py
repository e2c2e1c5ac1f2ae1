"""What a step of mokd.py costs: its time and memory by part, measured on this machine, or computed without running it.

    python extras/benchmark.py --batch_size 256                      # images/s, milliseconds by part, memory, FLOPs; flags are mokd.py's
    python extras/benchmark.py --memory --batch_size 64              # will it fit? FLOPs and peak memory by part, computed: runs anywhere
    python extras/benchmark.py --compare "--losses sm"               # a step with these flags beside one without, in turns
    python extras/benchmark.py --gpu                                 # all that README's table wants of a GPU, in ten minutes, as markdown

Without --data the images are drawn: JPEGs of 500 x 375 pixels in a temporary folder. One process is timed, so --batch_size is the images
of one device.
"""
import argparse
import contextlib
import copy
import os
import random
import sys
import tempfile
import time
import weakref
from collections import Counter
from unittest import mock

import torch
import torch.nn as nn
from PIL import Image, ImageFilter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torchvision.transforms import v2 as T

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))   # the repository, where mokd.py lies
import mokd   # noqa: E402
from mokd import UserError, say   # noqa: E402

PER_EPOCH = 10 ** 6   # steps of an epoch, so that no schedule moves while steps are timed

# Dense 16-bit matrix products in TFLOP/s, from the makers' data sheets. The first name that is part of the GPU's own counts.
PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165,
        "3090": 71, "V100": 125, "T4": 65}

def parse(argv=None):
    """The command line -> this program's settings, with .cfg, mokd.py's of the rest, and .argv, the rest. Raises UserError."""
    parser = argparse.ArgumentParser(prog="extras/benchmark.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="All other flags are mokd.py's: python mokd.py --help.")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps that are timed, after three that are not (default: 20)")
    parser.add_argument("--memory", action="store_true", help="compute FLOPs and peak memory, and run nothing")
    parser.add_argument("--compare", metavar="FLAGS", help="flags of mokd.py, in quotes, of the second of two settings")
    parser.add_argument("--gpu", action="store_true", help="the measurements of README's table")
    options, options.argv = parser.parse_known_args(argv)
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be at least 1")
    if options.memory + options.gpu + (options.compare is not None) > 1:
        raise UserError("give one of --memory, --compare and --gpu")
    options.cfg = mokd.parse_args(options.argv)
    return options

# ------------------------------------------------------------------------------------------------- the parts of a step
class Scaler(torch.amp.GradScaler):
    """Tells that backward begins: train_step scales each loss right before."""
    def __init__(self, mark, device, enabled):
        super().__init__(device, enabled=enabled)
        self.mark = mark

    def scale(self, outputs):
        self.mark("backward")
        return super().scale(outputs)

@contextlib.contextmanager
def marked(models, mark):
    """Calls mark(part) where a part of train_step begins. All is wrapped from outside, so that the step itself holds no timing, and
    outside of what torch.compile compiles."""
    def telling(function, part, after=None):
        def told(*args, **kwargs):
            mark(part)
            result = function(*args, **kwargs)
            if after:
                mark(after)
            return result
        return told
    nets = [m.n_ for m in models]
    with mock.patch.object(mokd, "search", telling(mokd.search, "search", "losses")):
        for m in models:
            m.n = telling(m.n, "students")
            m.n_ = telling(m.n_, "momentum nets", "search" if "ct" in m.cfg.losses else "losses")
            m.update = telling(m.update, "update")
        try:
            yield
        finally:
            for m, net in zip(models, nets):
                del m.n, m.update   # the class's own show again
                m.n_ = net

# -------------------------------------------------------------------------------------------------------- time
class Clock:
    """Time by part. On a GPU the marks are events between kernels, for which nobody waits until the end."""
    def __init__(self, device):
        self.gpu, self.marks = device.type == "cuda", []

    def __call__(self, part):
        moment = time.perf_counter()
        if self.gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((part, moment))

    def milliseconds(self):
        """-> {part: ms}, from each mark to the next."""
        total = Counter()
        wait(self.gpu)
        for (part, start), (_, end) in zip(self.marks, self.marks[1:]):
            total[part] += start.elapsed_time(end) if self.gpu else 1000 * (end - start)
        return total

def wait(gpu):
    if gpu:
        torch.cuda.synchronize()

def time_steps(cfg, models, source, device, steps, untimed=3):
    """-> seconds a step, {part: ms a step} of `steps` steps on the crops that source yields; the first ones allocate, tune, compile."""
    clock = Clock(device)
    scaler = Scaler(clock, device.type, cfg.dtype == "fp16")
    now = mokd.schedule(cfg, cfg.freeze_last_layer * PER_EPOCH, PER_EPOCH)   # the last layers learn
    with marked(models, clock):
        for step in range(-untimed, steps):
            if step == 0:
                wait(clock.gpu)
                clock.marks.clear()
                start = time.perf_counter()
            clock("waiting for data")
            crops = next(source)
            clock("views")
            x = mokd.make_views(crops, cfg, device, step + untimed)
            mokd.train_step(*models, x, cfg, now, scaler)
        clock("end")
    parts = clock.milliseconds()
    return (time.perf_counter() - start) / steps, {part: ms / steps for part, ms in parts.items()}

def draw_crops(cfg, device):
    """A batch as the loader gives it, of random pixels, on the device."""
    sizes = (2, cfg.global_size), (cfg.local_crops, cfg.local_size)
    return [torch.randint(256, (cfg.batch_size, n, size, size, 3), dtype=torch.uint8, device=device) for n, size in sizes]

def draw_jpegs(folder, n=64):
    """Photograph-like JPEGs of 500 x 375 pixels: smooth colors with some noise."""
    os.makedirs(f"{folder}/all", exist_ok=True)
    for i in range(n):
        g = mokd.generator("jpeg", i)
        smooth = nn.functional.interpolate(torch.rand(1, 3, 24, 32, generator=g), (375, 500), mode="bicubic")[0]
        pixels = (255 * smooth + 12 * torch.randn(3, 375, 500, generator=g)).clamp(0, 255).to(torch.uint8)
        T.functional.to_pil_image(pixels).save(f"{folder}/all/{i}.jpg", quality=90)

@contextlib.contextmanager
def images_of(cfg, drawn):
    """Yields the training images of --data, or drawn ones."""
    with tempfile.TemporaryDirectory() as folder:
        if drawn:
            draw_jpegs(folder)
            cfg.data = folder
        yield mokd.get_data(cfg)[0]

def load_forever(cfg, images, device):
    """Yields batches of the loader that training uses; a small data set is gone through again and again."""
    own = copy.copy(cfg)
    own.epochs = PER_EPOCH
    repeats = -(-cfg.batch_size // len(images))   # an epoch has at least one batch
    images = torch.utils.data.ConcatDataset([images] * repeats)
    return iter(mokd.make_loader(mokd.MultiCrop(images, own), device, cfg.workers, batch_sampler=mokd.batches(len(images), own)))

def usual_pipeline(cfg):
    """The views of an image as they are usually made: by PIL, one after the other, each with all its augmentations."""
    def view(size, scale, blur, solarize):
        blurred = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(*cfg.blur))))
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*cfg.jitter)], 0.8), T.RandomGrayscale(cfg.grayscale), T.RandomApply([blurred], blur),
            T.RandomSolarize(128, solarize), T.PILToTensor(), T.ToDtype(torch.float32, scale=True),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    views = [view(cfg.global_size, cfg.global_scale, 1.0, 0.0), view(cfg.global_size, cfg.global_scale, 0.1, cfg.solarize)]
    local = view(cfg.local_size, cfg.local_scale, 0.5, 0.0)
    return views + [local] * cfg.local_crops

def time_worker(cfg, images, n=32):
    """-> CPU milliseconds an image of a loader's worker: to decode, to cut the crops, and of the usual PIL pipeline in its place."""
    crops, usual = mokd.MultiCrop(images, cfg), usual_pipeline(cfg)
    def by_pil(i):
        image = Image.open(images.samples[i][0]) if hasattr(images, "samples") else T.functional.to_pil_image(mokd.to_rgb(images[i][0]))
        image = image.convert("RGB")
        for view in usual:
            view(image)
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)   # as in a worker
    for work in (lambda i: mokd.to_rgb(images[i][0]), lambda i: crops[0, i], by_pil):
        work(0)
        start = time.process_time()
        for i in range(n):
            work(i % len(images))
        times.append(1000 * (time.process_time() - start) / n)
    torch.set_num_threads(threads)
    return times[0], times[1] - times[0], times[2]

# ------------------------------------------------------------------------------------- memory and FLOPs, computed
FLOPS = dict(flop_registry)   # of an operation, by its arguments; torch leaves out the CPU's attention
FLOPS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(
    q.shape, k.shape, v.shape)
FLOPS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward] = lambda grad, q, k, v, *_, out_val=None, **__: (
    sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))

class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and FLOPs, each to the part in which it was made."""
    def __init__(self):
        super().__init__()
        self.part, self.sizes, self.live, self.at_peak, self.peak, self.flops = "", {}, Counter(), {}, 0, Counter()

    def mark(self, part):
        self.part = part

    def gone(self, key):
        part, size = self.sizes.pop(key)
        self.live[part] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in FLOPS:
            self.flops[self.part] += FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.sizes:
                storage = t.untyped_storage()
                self.sizes[storage._cdata] = self.part, storage.nbytes()
                self.live[self.part] += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        if sum(self.live.values()) > self.peak:
            self.peak, self.at_peak = sum(self.live.values()), dict(self.live)
        return out

class Fake(FakeTensorMode):
    """Tensors without memory. A deep copy of one, as of a momentum net, is of the same mode."""
    def __deepcopy__(self, memo):
        return self

def empty_its_tensors(net):
    """Give a real net tensors of the mode that is on, as large and of the same types."""
    for module in net.modules():
        for own in (module._parameters, module._buffers):
            for name, t in own.items():
                if t is not None:
                    fake = torch.empty(t.shape, dtype=t.dtype)
                    own[name] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
    return net

def mark_modules(models, meter):
    """Let the meter tell backbones, heads and logits apart within the students."""
    for m in models:
        outside = []
        def enter(module, args, part, outside=outside):
            outside.append(meter.part)
            meter.mark(part)
        def leave(module, args, out, outside=outside):
            meter.mark(outside.pop())
        backbone = f"backbone {m.i}, {getattr(m.cfg, f'arch{m.i}')}"
        lasts = [head.last for head in (m.net.mlp_head, m.net.t_head) if head is not None]
        for module, part in ((m.net.backbone, backbone), *((last, "logits") for last in lasts)):
            module.register_forward_pre_hook(lambda module, args, part=part, enter=enter: enter(module, args, part))
            module.register_forward_hook(leave)

def compute(cfg):
    """One step of one process on tensors without memory -> its Meter. They are the CPU's, because torch's engine needs a GPU for a
    GPU's; sizes are the same, attention is the fused one on both. fp16 is computed as bf16, whose sizes it has."""
    cfg = copy.copy(cfg)
    cfg.compile, device, cut = False, torch.device("cpu"), []
    cfg.dtype = "bf16" if cfg.dtype in ("auto", "fp16") else cfg.dtype
    with mock.patch.object(mokd, "Model", lambda *args: args):
        parts = mokd.build_models(cfg, device)   # real backbones, and no heads yet
    no_values = mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor)   # which reads what it drew
    on_device = mock.patch.object(nn.Module, "to", lambda net, *_, **__: net)
    now = mokd.schedule(cfg, cfg.freeze_last_layer * PER_EPOCH, PER_EPOCH)
    with no_values, on_device, Fake(), Meter() as meter:
        scaler = Scaler(meter.mark, "cpu", enabled=False)
        meter.mark("weights")
        models = [mokd.Model(cfg, i, empty_its_tensors(backbone), device, 1) for _, i, backbone, *_ in parts]
        meter.mark("optimizers")
        for m in models:   # a first update makes their states
            for p in m.params:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            m.update(now, scaler)
        meter.mark("views")
        sizes = [(2, cfg.global_size)] + [(cfg.local_crops, cfg.local_size)] * (cfg.local_crops > 0)
        x = [torch.empty(n * cfg.batch_size, 3, size, size) for n, size in sizes]
        mark_modules(models, meter)
        meter.peak = 0
        meter.flops.clear()
        with marked(models, meter.mark):
            mokd.train_step(*models, x, cfg, now, scaler)
    return meter

NAMES = {"students": "heads", "optimizers": "optimizer states", "backward": "gradients, and working memory of backward",
         "losses": "losses, forward", "weights": "weights, of students and momentum nets"}

def report_memory(cfg):
    meter = compute(cfg)
    dtype = "bf16" if cfg.dtype == "auto" else cfg.dtype
    say(f"{cfg.arch1} and {cfg.arch2}, {cfg.batch_size} images on one device, {dtype}; computed\n")
    say(f"{'part':48}{'GFLOP an image':>16}{'GB at the peak':>16}")
    for part in [*meter.at_peak, *(meter.flops.keys() - meter.at_peak.keys())]:
        gflop, gb = meter.flops[part] / cfg.batch_size / 1e9, meter.at_peak.get(part, 0) / 1e9
        if gflop >= 0.005 or gb >= 0.0005:
            say(f"{NAMES.get(part, part):48}{gflop:16.2f}{gb:16.3f}")
    say(f"{'all':48}{meter.flops.total() / cfg.batch_size / 1e9:16.2f}{meter.peak / 1e9:16.3f}")
    say("\nNot in it: what CUDA itself takes (about half a GB), the allocator's rounding and its gaps, the working memory of cuDNN and "
        "cuBLAS, the making of views, the next batch.")

# ------------------------------------------------------------------------------------------------------- reports
def share_of_peak(flops_a_second, device):
    """-> ', 31.0 % of its peak' of a GPU that is known, else nothing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, tflops in PEAK.items():
        if known in name:
            return f", {100 * flops_a_second / tflops / 1e12:.1f} % of what {name} can"
    return ""

def describe(seconds, parts, cfg):
    words = ", ".join(f"{part} {ms:.1f}" for part, ms in parts.items())
    return f"{cfg.batch_size / seconds:.1f} images/s, {1000 * seconds:.1f} ms a step: {words}"

def report_time(cfg, images, device, steps):
    models = mokd.build_models(cfg, device)
    kept = draw_crops(cfg, device)
    seconds, parts = time_steps(cfg, models, iter(lambda: kept, None), device, steps)
    say(f"a batch that stays on the device: {describe(seconds, parts, cfg)}")
    memory = mokd.memory_gb(device)
    say(f"through the loader, {cfg.workers} workers: "
        f"{describe(*time_steps(cfg, models, load_forever(cfg, images, device), device, steps), cfg)}")
    del models
    meter = compute(cfg)
    rate = meter.flops.total() / seconds
    say(f"{rate / 1e12:.3f} TFLOP/s{share_of_peak(rate, device)}; {meter.flops.total() / cfg.batch_size / 1e9:.1f} GFLOP an image (--memory: by "
        f"part)\npeak memory {memory:.2f} GB measured{'' if device.type == 'cuda' else ', of the process'}, {meter.peak / 1e9:.2f} GB computed")
    say("CPU ms an image of a worker: decode {:.2f}, crop {:.2f}; the usual PIL pipeline {:.2f}".format(*time_worker(cfg, images)))

def compare(settings, device, steps, turns=4):
    """-> for each of two settings, the seconds a step of its best turn. Steps take turns in one process, so that both have the same machine.
    On the CPU they are CPU seconds: what other programs take does not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    runs, best = [], [float("inf")] * len(settings)
    for cfg in settings:
        kept = draw_crops(cfg, device)
        runs.append((cfg, mokd.build_models(cfg, device), kept, mokd.schedule(cfg, cfg.freeze_last_layer * PER_EPOCH, PER_EPOCH),
                     torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")))
    for turn in range(-1, turns):   # the first is not counted
        for i, (cfg, models, kept, now, scaler) in enumerate(runs):
            wait(device.type == "cuda")
            start = clock()
            for step in range(steps):
                mokd.train_step(*models, mokd.make_views(kept, cfg, device, step), cfg, now, scaler)
            wait(device.type == "cuda")
            if turn >= 0:
                best[i] = min(best[i], (clock() - start) / steps)
    return best

# -------------------------------------------------------------------------------------------------- one command for a GPU
MEASUREMENTS = {   # row of the table -> flags on top of those given
    "all losses": [], "--losses sm": ["--losses", "sm"], "--recipe release": ["--recipe", "release"],
    "--search local": ["--search", "local"], "--compile": ["--compile", "on"], "--dtype fp16": ["--dtype", "fp16"]}
if "grad_checkpointing" in mokd.Config.__dataclass_fields__:
    MEASUREMENTS["--grad_checkpointing"] = ["--grad_checkpointing", "on"]

def measure(argv, device, steps, batch_sizes):
    """-> settings, seconds a step, GB of the largest batch that fits. Raises UserError where none does."""
    for batch_size in batch_sizes:
        cfg = mokd.parse_args([*argv, "--batch_size", str(batch_size)])
        mokd.fill_in_machine(cfg, device, 1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            models = mokd.build_models(cfg, device)
            kept = draw_crops(cfg, device)
            seconds, _ = time_steps(cfg, models, iter(lambda: kept, None), device, steps)
            return cfg, seconds, mokd.memory_gb(device)
        except torch.cuda.OutOfMemoryError:
            models = kept = None   # a smaller batch may fit
    raise UserError(f"--batch_size {batch_sizes[-1]}: not even that fits into the GPU's memory", code=1)

def table(argv, images, device, steps, batch_sizes, limit=480):
    """-> the lines of README's table in markdown. Rows that would begin after `limit` seconds are left out, and named."""
    start, fastest, late = time.time(), None, []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [f"| on one {name} | images | ms a step | images/s | to all losses | GB measured | GB computed | TFLOP/s |",
             "|---|---|---|---|---|---|---|---|"]
    for row, flags in MEASUREMENTS.items():
        if time.time() - start > limit:
            late.append(row)
            continue
        cfg, seconds, memory = measure([*argv, *flags], device, steps, batch_sizes)
        meter, per_image = compute(cfg), seconds / cfg.batch_size
        fastest = fastest or per_image   # of the first row, all losses
        rate = meter.flops.total() / seconds
        lines.append(f"| {row} | {cfg.batch_size} | {1000 * seconds:.1f} | {cfg.batch_size / seconds:.0f} | {per_image / fastest:.2f} | "
                     f"{memory:.2f} | {meter.peak / 1e9:.2f} | {rate / 1e12:.2f}{share_of_peak(rate, device)} |")
        say(lines[-1])
    cfg = mokd.parse_args([*argv, "--batch_size", str(batch_sizes[-1])])
    mokd.fill_in_machine(cfg, device, 1)
    seconds, parts = time_steps(cfg, mokd.build_models(cfg, device), load_forever(cfg, images, device), device, steps)
    lines.append(f"| all losses, JPEGs through {cfg.workers} workers | {cfg.batch_size} | {1000 * seconds:.1f} | "
                 f"{cfg.batch_size / seconds:.0f} | {seconds / cfg.batch_size / fastest:.2f} | | | |")
    words = ", ".join(f"{part} {ms:.1f}" for part, ms in parts.items())
    decode, crop, usual = time_worker(cfg, images)
    lines += ["", f"ms by part of the last row: {words}.",
              f"A worker's CPU ms an image: decode {decode:.2f}, crop {crop:.2f}; the usual PIL pipeline {usual:.2f}.",
              f"torch {torch.__version__}, {steps} steps a row, data on the device but for the last row."]
    if late:
        lines.append(f"Left out after {limit} s: {', '.join(late)}.")
    return lines

def run(options):
    cfg = options.cfg
    if options.memory:
        return report_memory(cfg)
    device, _, world = mokd.join_processes()
    if world > 1:
        raise UserError("one process is timed: start it with python, not with torchrun")
    drawn = "--data" not in options.argv and not any(word.startswith("--data=") for word in options.argv)
    mokd.fill_in_machine(cfg, device, world)
    if options.gpu:
        if device.type != "cuda":
            raise UserError("--gpu: there is no CUDA device here; --memory computes without one")
        with images_of(cfg, drawn) as images:
            flags = [*options.argv] if not drawn else [*options.argv, "--data", cfg.data]
            say("\n" + "\n".join(table(flags, images, device, options.steps, [256, 128, 64, 32, 16])))
    elif options.compare is not None:
        other = mokd.parse_args([*options.argv, *options.compare.split()])
        mokd.fill_in_machine(other, device, world)
        first, second = compare([cfg, other], device, options.steps)
        unit = "s" if device.type == "cuda" else "CPU s"
        say(f"a step of {cfg.batch_size} images {first:.4f} {unit}; with {options.compare} {second:.4f} {unit}: "
            f"{first / second:.2f} to 1 (best of 4 turns of {options.steps} steps)")
    else:
        with images_of(cfg, drawn) as images:
            report_time(cfg, images, device, options.steps)

if __name__ == "__main__":
    sys.exit(mokd.main(program="extras/benchmark.py", parse=parse, run=run))
