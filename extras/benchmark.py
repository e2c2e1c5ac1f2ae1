"""What a step of mokd.py costs: time and memory by part, measured, or computed without running it.

    python extras/benchmark.py --batch_size 256         # images/s, milliseconds by part, memory, FLOPs
    python extras/benchmark.py --memory --batch_size 64 # will it fit? peak memory and FLOPs by part, computed
    python extras/benchmark.py --compare "--losses sm"  # a step beside one with these flags, in turns
    python extras/benchmark.py --gpu                    # what README's table wants of a GPU, in ten minutes

All other flags are mokd.py's. Without --data the images are drawn: JPEGs of 500 x 375 pixels in a temporary
folder. One process is timed, so --batch_size is the images of one device.
"""
import argparse
import contextlib
import copy
import gc
import os
import random
import sys
import tempfile
import time
import warnings
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))   # where mokd.py lies
import mokd   # noqa: E402
from mokd import UserError, say   # noqa: E402

PER_EPOCH = 10 ** 6   # steps of an epoch, so that no schedule moves while steps are timed

# Dense 16-bit matrix products in TFLOP/s, from the makers' data sheets. The first name that is part of the
# GPU's own counts.
PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
        "A10": 125, "4090": 165, "3090": 71, "V100": 125, "T4": 65}

def parse(argv=None):
    """The command line -> this program's settings; .argv has the rest of it, and .cfg what mokd.py makes of
    that. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="extras/benchmark.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, metavar="N",
                        help="steps that are timed, after three that are not (default: 20)")
    parser.add_argument("--memory", action="store_true",
                        help="compute peak memory and FLOPs, and run nothing")
    parser.add_argument("--compare", metavar="FLAGS",
                        help="flags of mokd.py, in quotes, that a second setting has on top")
    parser.add_argument("--gpu", action="store_true", help="print README's table for this GPU, in markdown")
    options, options.argv = parser.parse_known_args(argv)
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be at least 1")
    if options.memory + options.gpu + (options.compare is not None) > 1:
        raise UserError("give one of --memory, --compare and --gpu")
    options.cfg = mokd.parse_args(options.argv)
    return options

# ---------------------------------------------------------------------------------------- the parts of a step
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
    """Calls mark(part) where a part of train_step begins. All is wrapped from outside: the step itself holds
    no timing, and torch.compile compiles none."""
    def telling(function, part, after=None):
        def told(*args, **kwargs):
            mark(part)
            result = function(*args, **kwargs)
            if after:
                mark(after)
            return result
        return told
    with mock.patch.object(mokd, "search", telling(mokd.search, "search", "losses")):
        for m in models:
            m.n = telling(m.n, "students")
            m.n_ = telling(m.n_, "momentum nets", "search" if "ct" in mokd.loss_names(m.cfg) else "losses")
            m.update = telling(m.update, "update")
        try:
            yield
        finally:
            for m in models:
                del m.n, m.update   # the class's own show again
                m.n_ = m.momentum_net

# ------------------------------------------------------------------------------------------------------- time
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
    """-> seconds a step, {part: ms a step}, of `steps` steps on the crops that source yields. Steps before
    them, which allocate, tune and compile, do not count."""
    clock = Clock(device)
    scaler = Scaler(clock, device.type, cfg.dtype == "fp16")
    now = now_of(cfg)
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

def now_of(cfg):
    """The schedules after the epochs in which last layers stand still."""
    return mokd.schedule(cfg, cfg.freeze_last_layer * PER_EPOCH, PER_EPOCH)

def draw_crops(cfg, device):
    """A batch as the loader gives it, of random pixels, on the device."""
    crops = []
    for n, size in (2, cfg.global_size), (cfg.local_crops, cfg.local_size):
        shape = cfg.batch_size, n, size, size, 3
        crops.append(torch.randint(256, shape, dtype=torch.uint8, device=device))
    return crops

def draw_jpegs(folder, n=64):
    """Photograph-like JPEGs of 500 x 375 pixels: smooth colors with some noise."""
    os.makedirs(f"{folder}/all", exist_ok=True)
    for i in range(n):
        g = mokd.generator("jpeg", i)
        colors = torch.rand(1, 3, 24, 32, generator=g)
        smooth = nn.functional.interpolate(colors, (375, 500), mode="bicubic")[0]
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
    keys = mokd.batches(len(images), own)
    return iter(mokd.make_loader(mokd.MultiCrop(images, own), device, cfg.workers, batch_sampler=keys))

def usual_pipeline(cfg):
    """The views of an image as they are usually made: by PIL, one by one, each with all augmentations."""
    def blurred(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*cfg.blur)))

    def view(size, scale, blur, solarize):
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(*cfg.jitter)], 0.8),
            T.RandomGrayscale(cfg.grayscale), T.RandomApply([T.Lambda(blurred)], blur),
            T.RandomSolarize(128, solarize), T.PILToTensor(), T.ToDtype(torch.float32, scale=True),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    first = view(cfg.global_size, cfg.global_scale, 1.0, 0.0)
    second = view(cfg.global_size, cfg.global_scale, 0.1, cfg.solarize)
    return [first, second] + [view(cfg.local_size, cfg.local_scale, 0.5, 0.0)] * cfg.local_crops

def cpu_milliseconds(work, n, of):
    """-> CPU ms a call of work(i), for i below n in turn, in n calls after one."""
    work(0)
    start = time.process_time()
    for i in range(n):
        work(i % of)
    return 1000 * (time.process_time() - start) / n

def time_worker(cfg, images, n=32):
    """-> CPU milliseconds an image of a loader's worker: to decode it, to cut its crops, and of the usual PIL
    pipeline in place of both."""
    crops, usual = mokd.MultiCrop(images, cfg), usual_pipeline(cfg)

    def by_pil(i):
        if hasattr(images, "samples"):
            image = Image.open(images.samples[i][0]).convert("RGB")
        else:
            image = T.functional.to_pil_image(mokd.to_rgb(images[i][0]))
        for view in usual:
            view(image)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)   # as in a worker
    decode = cpu_milliseconds(lambda i: mokd.to_rgb(images[i][0]), n, len(images))
    both = cpu_milliseconds(lambda i: crops[0, i], n, len(images))
    pil = cpu_milliseconds(by_pil, n, len(images))
    torch.set_num_threads(threads)
    return decode, both - decode, pil

# --------------------------------------------------------------------------------- memory and FLOPs, computed
def attention_flops(q, k, v, *_, out_val=None, **__):
    return sdpa_flop_count(q.shape, k.shape, v.shape)

def attention_backward_flops(grad, q, k, v, *_, out_val=None, **__):
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)

FLOPS = dict(flop_registry) | {   # of an operation, by its arguments; torch's leaves out the CPU's attention
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops}

class Meter(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and FLOPs, by the part in which they were made."""
    def __init__(self):
        super().__init__()
        self.part, self.sizes, self.live, self.flops = "", {}, Counter(), Counter()
        self.peak, self.at_peak = 0, {}

    def mark(self, part):
        self.part = part

    def gone(self, key):
        part, size = self.sizes.pop(key)
        self.live[part] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in FLOPS:
            self.flops[self.part] += FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in self.sizes:
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
    """Let the meter tell backbones and logits apart within the students; the rest of them is heads."""
    outside = []   # the parts within which a module runs

    def mark(module, part):
        def enter(*_):
            outside.append(meter.part)
            meter.mark(part)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda *_: meter.mark(outside.pop()))
    for m in models:
        mark(m.net.backbone, f"backbone {m.i}, {getattr(m.cfg, f'arch{m.i}')}")
        for head in (m.net.mlp_head, m.net.t_head):
            if head is not None:
                mark(head.last, "logits")

def compute(cfg):
    """One step of one process on tensors without memory -> its Meter. They are tensors of the CPU, because
    torch's backward asks a GPU's driver for streams; a GPU's have the same sizes, and its attention is as
    frugal. fp16 is computed as bf16."""
    cfg = copy.copy(cfg)
    cfg.dtype = "bf16" if cfg.dtype in ("auto", "fp16") else cfg.dtype
    cfg.compile, device = False, torch.device("cpu")
    with mock.patch.object(mokd, "Model", lambda *args: args):
        parts = mokd.build_models(cfg, device)   # real backbones, and no heads yet
    no_values = mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor)   # it reads them
    stays = mock.patch.object(nn.Module, "to", lambda net, *_, **__: net)
    with warnings.catch_warnings(), no_values, stays, Fake(), Meter() as meter:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")   # to copy it
        scaler, now = Scaler(meter.mark, "cpu", enabled=False), now_of(cfg)
        meter.mark("weights")
        models = [mokd.Model(cfg, i, empty_its_tensors(backbone), device) for _, i, backbone, *_ in parts]
        meter.mark("optimizers")
        for m in models:   # a first update makes their states
            for p in m.params:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            m.update(now, scaler)
        meter.mark("views")
        x = [torch.empty(2 * cfg.batch_size, 3, cfg.global_size, cfg.global_size)]
        if cfg.local_crops:
            x.append(torch.empty(cfg.local_crops * cfg.batch_size, 3, cfg.local_size, cfg.local_size))
        mark_modules(models, meter)
        meter.peak = 0
        meter.flops.clear()
        with marked(models, meter.mark):
            mokd.train_step(*models, x, cfg, now, scaler)
    return meter

NAMES = {"students": "students' heads", "weights": "weights of students and momentum nets",
         "optimizers": "optimizer states", "losses": "losses, forward",
         "backward": "backward: gradients, working memory"}

def report_memory(cfg):
    meter = compute(cfg)
    say(f"{cfg.arch1} and {cfg.arch2}, {cfg.batch_size} images on one device, "
        f"{'bf16' if cfg.dtype == 'auto' else cfg.dtype}; computed\n")
    say(f"{'part':40}{'GFLOP an image':>16}{'GB at the peak':>16}")
    for part in [*meter.at_peak, *(part for part in meter.flops if part not in meter.at_peak)]:
        gflop, gb = meter.flops[part] / cfg.batch_size / 1e9, meter.at_peak.get(part, 0) / 1e9
        if gflop >= 0.005 or gb >= 0.0005:
            say(f"{NAMES.get(part, part):40}{gflop:16.2f}{gb:16.3f}")
    say(f"{'all':40}{meter.flops.total() / cfg.batch_size / 1e9:16.2f}{meter.peak / 1e9:16.3f}\n\n"
        "Left out: what CUDA itself takes (about half a GB), the allocator's rounding and gaps, the\n"
        "working memory of cuDNN and cuBLAS, the making of views, and the next batch.")

# ---------------------------------------------------------------------------------------------------- reports
def share_of_peak(flops_a_second, device):
    """-> ', 31.0 % of its peak' of a GPU that is known, else nothing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, tflops in PEAK.items():
        if known in name:
            return f", {100 * flops_a_second / tflops / 1e12:.1f} % of its peak"
    return ""

def name_parts(parts):
    return ", ".join(f"{part} {ms:.1f}" for part, ms in parts.items())

def report_time(cfg, images, device, steps):
    models = mokd.build_models(cfg, device)
    kept, rates = draw_crops(cfg, device), []
    for name, source in (("a batch kept on the device", iter(lambda: kept, None)),
                         (f"through {cfg.workers} workers", load_forever(cfg, images, device))):
        seconds, parts = time_steps(cfg, models, source, device, steps)
        rates.append(cfg.batch_size / seconds)
        say(f"{name}: {rates[-1]:.1f} images/s, {1000 * seconds:.1f} ms a step: {name_parts(parts)}")
    del source   # ends its workers
    memory, kind = mokd.memory_gb(device), "measured" if device.type == "cuda" else "of the whole process"
    del models
    meter = compute(cfg)
    flops_an_image = meter.flops.total() / cfg.batch_size
    rate = rates[0] * flops_an_image
    say(f"{flops_an_image / 1e9:.1f} GFLOP an image (by part: --memory), so {rate / 1e12:.3f} TFLOP/s"
        f"{share_of_peak(rate, device)}")
    say(f"peak memory {memory:.2f} GB {kind}, {meter.peak / 1e9:.2f} GB computed")
    say("CPU ms an image in a worker: decode {:.2f}, crop {:.2f}; usual PIL pipeline {:.2f}".format(
        *time_worker(cfg, images)))

def compare(settings, device, steps, turns=4):
    """-> for each setting the seconds a step of its best turn. The settings take turns in one process, so
    that they meet the same machine. On the CPU it is CPU seconds: those of other programs do not count."""
    gpu, runs, best = device.type == "cuda", [], [float("inf")] * len(settings)
    clock = time.perf_counter if gpu else time.process_time
    for cfg in settings:
        scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
        runs.append((cfg, mokd.build_models(cfg, device), draw_crops(cfg, device), now_of(cfg), scaler))
    for turn in range(-1, turns):   # the first allocates, and is not counted
        for i, (cfg, models, kept, now, scaler) in enumerate(runs):
            wait(gpu)
            start = clock()
            for step in range(steps):
                mokd.train_step(*models, mokd.make_views(kept, cfg, device, step), cfg, now, scaler)
            wait(gpu)
            if turn >= 0:
                best[i] = min(best[i], (clock() - start) / steps)
    return best

# -------------------------------------------------------------------------------------- one command for a GPU
MEASUREMENTS = {   # row of the table -> flags on top of those given; the last takes minutes to compile
    "all losses": [], "`--losses sm`": ["--losses", "sm"],
    "`--grad_checkpointing`": ["--grad_checkpointing", "on"], "`--recipe release`": ["--recipe", "release"],
    "`--search local`": ["--search", "local"], "`--dtype fp16`": ["--dtype", "fp16"],
    "`--compile`": ["--compile", "on"]}

def measure(argv, device, steps, batch_sizes):
    """-> settings, seconds a step, GB, of the first batch size that fits. Raises UserError if none does."""
    for batch_size in batch_sizes:
        cfg = mokd.parse_args([*argv, "--batch_size", str(batch_size)])
        mokd.fill_in_machine(cfg, device, 1)
        if device.type == "cuda":   # nothing of the row before may count
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            models = mokd.build_models(cfg, device)
            kept = draw_crops(cfg, device)
            seconds, _ = time_steps(cfg, models, iter(lambda: kept, None), device, steps)
            return cfg, seconds, mokd.memory_gb(device)
        except torch.cuda.OutOfMemoryError:
            models = kept = None   # before a smaller batch is tried
    raise UserError(f"--batch_size {batch_sizes[-1]}: not even that fits into this GPU's memory", code=1)

def table(argv, images, device, steps, batch_sizes, limit=420):
    """-> the lines of README's table, in markdown. What would begin after `limit` seconds is left out, and
    named."""
    start, first, late = time.time(), None, []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [f"| one {name} | images | ms a step | images/s | to all losses | GB | GB computed | TFLOP/s |",
             "|---|---|---|---|---|---|---|---|"]

    def add(row, cfg, seconds, *cells):
        ratio = seconds / cfg.batch_size / first
        cells = [row, cfg.batch_size, f"{1000 * seconds:.1f}", f"{cfg.batch_size / seconds:.1f}",
                 f"{ratio:.2f}", *cells]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        say(lines[-1])
    for row, flags in MEASUREMENTS.items():
        if time.time() - start > limit:
            late.append(row)
            continue
        cfg, seconds, memory = measure([*argv, *flags], device, steps, batch_sizes)
        if first is None:   # all losses; no row gets a larger batch
            first, all_losses = seconds / cfg.batch_size, cfg
            batch_sizes = [n for n in batch_sizes if n <= cfg.batch_size]
        meter = compute(cfg)
        rate = meter.flops.total() / seconds
        add(row, cfg, seconds, f"{memory:.2f}", f"{meter.peak / 1e9:.2f}",
            f"{rate / 1e12:.2f}{share_of_peak(rate, device)}")
    source = load_forever(all_losses, images, device)
    models = mokd.build_models(all_losses, device)
    seconds, parts = time_steps(all_losses, models, source, device, steps)
    del source   # ends its workers
    add(f"all losses, JPEGs through {all_losses.workers} workers", all_losses, seconds, "", "", "")
    decode, crop, usual = time_worker(all_losses, images)
    lines += ["", f"ms by part of the last row: {name_parts(parts)}.",
              f"CPU ms an image in a worker: decode {decode:.2f}, crop {crop:.2f}; usual PIL pipeline "
              f"{usual:.2f}.",
              f"torch {torch.__version__}, {steps} steps a row; only the last row has a loader."]
    if late:
        lines.append(f"Left out after {limit} s: {', '.join(late)}.")
    return lines

def run(options):
    cfg = options.cfg
    if options.memory:
        return report_memory(cfg)
    device, _, world = mokd.join_processes()
    if world > 1:
        raise UserError("one process is timed: start this with python, not with torchrun")
    if options.gpu and device.type != "cuda":
        raise UserError("--gpu: there is no CUDA device here; --memory computes without one")
    mokd.fill_in_machine(cfg, device, world)
    if options.compare is not None:
        other = mokd.parse_args([*options.argv, *options.compare.split()])
        mokd.fill_in_machine(other, device, world)
        one, two = compare([cfg, other], device, options.steps)
        unit = "s" if device.type == "cuda" else "CPU s"
        say(f"a step of {cfg.batch_size} images {one:.4f} {unit}, with {options.compare} {two:.4f} {unit}: "
            f"{one / two:.2f} to 1 (best of 4 turns of {options.steps} steps)")
        return
    drawn = not any(word == "--data" or word.startswith("--data=") for word in options.argv)
    with images_of(cfg, drawn) as images:
        if options.gpu:
            argv = [*options.argv, "--data", cfg.data]
            say("\n" + "\n".join(table(argv, images, device, options.steps, [256, 128, 64, 32, 16])))
        else:
            report_time(cfg, images, device, options.steps)

if __name__ == "__main__":
    sys.exit(mokd.main(program="extras/benchmark.py", parse=parse, run=run))
