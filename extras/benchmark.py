"""What a step of mokd.py costs: images/s, peak memory and FLOPs.

    python extras/benchmark.py --batch_size 256             # measured on this device, with random images
    python extras/benchmark.py --batch_size 256 --compile   # eager, and then compiled
    python extras/benchmark.py --batch_size 64 --memory     # will it fit? computed, without running it
    python extras/benchmark.py --batch_size 256 --gpu       # a table of costs, as in RESULTS.md
    python extras/benchmark.py --demo                       # a pair that is small enough for a CPU

All other flags are mokd.py's. --batch_size is the images of one device, on which they lie already. So a run
that reaches fewer images/s waits for its loader.
"""
import argparse, dataclasses, gc, os, sys, time, weakref   # noqa: E401

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))   # where mokd.py is
import mokd   # before torch
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mokd import say

def parse(argv=None):
    """-> this program's options. .argv has mokd.py's flags, and .cfg what mokd.py makes of them."""
    parser = argparse.ArgumentParser(description="All other flags are those of mokd.py.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after three that are not; 20")
    parser.add_argument("--memory", action="store_true", help="compute peak memory and FLOPs; run nothing")
    parser.add_argument("--gpu", action="store_true", help="print a table of costs for this GPU")
    options, options.argv = parser.parse_known_args(argv)
    options.cfg = mokd.parse_args(options.argv)
    return options

def settled(cfg, per_epoch=10 ** 6):
    """The schedules after the epochs in which the last layers are frozen."""
    return mokd.schedule(cfg, cfg.freeze_last_layer * per_epoch, per_epoch)

# --------------------------------------------------------------------------------------------------- measured
def random_crops(cfg, device):
    """A batch as mokd.MultiCrop gives it."""
    crops = [torch.randint(256, (cfg.batch_size, 2, cfg.global_size, cfg.global_size, 3), dtype=torch.uint8)]
    if cfg.local_crops:
        shape = cfg.batch_size, cfg.local_crops, cfg.local_size, cfg.local_size, 3
        crops.append(torch.randint(256, shape, dtype=torch.uint8))
    return [x.to(device) for x in crops]

def measure(cfg, device, steps):
    """-> seconds a step, and GB at the peak on a GPU, else None."""
    gpu = device.type == "cuda"
    if gpu:
        gc.collect()   # what was measured before does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    models = mokd.build_models(cfg, device)
    crops = random_crops(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    now = settled(cfg)
    for step in range(3 + steps):
        if step == 3:   # those before allocate, tune and compile
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
        x = mokd.make_views(crops, cfg, device, step)
        mokd.train_step(*models, x, cfg, now, scaler)
    if gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if gpu else None

# --------------------------------------------------------------------------------------------------- computed
class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as each lives."""
    def __init__(self):
        super().__init__()
        self.sizes = {}   # storage -> bytes
        self.live = self.peak = 0

    def add(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.remove, storage._cdata)
        self.peak = max(self.peak, self.live)

    def remove(self, storage):
        self.live -= self.sizes.pop(storage)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.add(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result

# torch counts the attention of GPUs alone; that of CPUs has the same FLOPs.
aten, counted = torch.ops.aten, flop_counter.flop_registry
counted[aten._scaled_dot_product_flash_attention_for_cpu] = flop_counter.sdpa_flop
counted[aten._scaled_dot_product_flash_attention_for_cpu_backward] = flop_counter.sdpa_backward_flop

def compute(cfg):
    """-> GB at the peak of a step, GFLOP an image. Models are real, but the step is fake and computes shapes
    alone. It is one of the CPU, whose tensors have the sizes of a GPU's, in fp32 or bf16."""
    dtype = "fp32" if cfg.dtype == "fp32" else "bf16"
    cfg = dataclasses.replace(cfg, compile=False, dtype=dtype)
    models = mokd.build_models(cfg, torch.device("cpu"))
    now = settled(cfg)
    flops = flop_counter.FlopCounterMode(display=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, Meter() as meter:
        weights = []   # what stands for them must stay alive
        for m in models:
            for net in (m.net, m.n_):
                weights += [fake.from_tensor(tensor) for tensor in (*net.parameters(), *net.buffers())]
        meter.add(weights)
        x = [torch.empty(2 * cfg.batch_size, 3, cfg.global_size, cfg.global_size)]
        if cfg.local_crops:
            x.append(torch.empty(cfg.local_crops * cfg.batch_size, 3, cfg.local_size, cfg.local_size))
        with flops:   # this step also makes the optimizers' states
            mokd.train_step(*models, x, cfg, now)
        meter.peak = 0
        mokd.train_step(*models, x, cfg, now)
    return meter.peak / 1e9, flops.get_total_flops() / cfg.batch_size / 1e9

# ---------------------------------------------------------------------------------------------------- reports
ROWS = {"**all losses**": [], "`--losses sm`": ["--losses", "sm"], "`--search local`": ["--search", "local"],
        "`--grad_checkpointing`": ["--grad_checkpointing"], "`--arch2 vit_base`": ["--arch2", "vit_base"],
        "`--compile`": ["--compile"]}   # name -> flags on top of those given

def print_table(options, device):
    """A row for each of ROWS. One that does not fit into the GPU says so."""
    n = options.cfg.batch_size
    say(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n\n"
        f"| a step | GFLOP an image | GB for 32 images | images/s | GB for {n} images |\n" + 5 * "|---" + "|")
    for name, flags in ROWS.items():
        cfg = mokd.parse_args(options.argv + flags)
        mokd.join_processes(cfg)   # fills in --dtype
        gb, gflop = compute(dataclasses.replace(cfg, batch_size=32))
        measured = "does not fit |"
        try:
            seconds, measured_gb = measure(cfg, device, options.steps)
            measured = f"{cfg.batch_size / seconds:.0f} | {measured_gb:.1f}"
        except torch.cuda.OutOfMemoryError:
            pass
        say(f"| {name} | {gflop:.1f} | {gb:.1f} | {measured} |")

def run(options):
    cfg = options.cfg
    if options.memory:
        gb, gflop = compute(cfg)
        say(f"{gb:.4g} GB at the peak of {cfg.batch_size} images, {gflop:.4g} GFLOP an image, computed\n"
            f"Left out: CUDA itself (half a GB), the allocator's gaps, what cuDNN and cuBLAS work in")
        return
    device = mokd.join_processes(cfg)
    if options.gpu:
        print_table(options, device)
        return
    gb, gflop = compute(cfg)
    for compiled in (False, True) if cfg.compile else (False,):
        seconds, measured_gb = measure(dataclasses.replace(cfg, compile=compiled), device, options.steps)
        images_s = cfg.batch_size / seconds
        name = "compiled" if compiled else "eager"
        say(f"{name}: {images_s:.1f} images/s, {1000 * seconds:.0f} ms a step, {gflop:.4g} GFLOP an image, "
            f"{gflop * images_s / 1000:.4g} TFLOP/s, peak {gb:.4g} GB computed")
        if measured_gb:
            say(f"peak {measured_gb:.4g} GB measured")

if __name__ == "__main__":
    mokd.main(parse=parse, run=run)
