"""Everything that one GPU can say about this package in nine minutes, in order of worth; no network is used.

    python benchmarks/gpu_day.py --out day                     # all parts, on the GPU that is there
    python benchmarks/gpu_day.py --out day --only fast small   # these parts, with all the minutes
    python benchmarks/gpu_day.py --out day --device cpu --tiny # a rehearsal: every line of every part, nothing worth reading
    python benchmarks/gpu_day.py wheels DIR                    # fetch the wheels below, for a machine that lacks them
    python benchmarks/run.py day                               # take day/*.json into benchmarks/ and write the tables (README.md)

Each part is a process of its own and keeps PART.json whole after every finding; a part that fails or is stopped says so there, and the next one goes on.
A bare machine needs the package's requirements. Those that an image with PyTorch, transformers, accelerate and peft usually lacks are the `WHEELS`.
"""

import argparse, contextlib, gc, itertools, json, os, shutil, signal, subprocess, sys, tarfile, tempfile, time, traceback
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEELS = (
    'diffusers importlib_metadata zipp open_clip_torch ftfy wcwidth clean-fid fastcore tyro typeguard '
    'docstring-parser datasets dill==0.4.0 '
    'multiprocess==0.70.18'
).split()  # 12 MB; multiprocess has a wheel per Python: say which with --python
NEEDED = (
    'torch torchvision diffusers transformers accelerate peft open_clip_torch clean-fid scipy numpy tyro '
    'safetensors pyarrow datasets'
).split()
PARTS = dict(
    where=15, right=115, fast=175, small=45, many=45, whole=70, real=75
)  # name: seconds of nine minutes
GOALS = dict(losses=1e-4, ratio=1.05, official=2.0, official_bf16=4.0, peak=0.1)
PIECE = 15 * 2**20  # bytes of one file that comes back

class Report:
    "What a part found: a JSON file that is always whole"

    def __init__(self, o, part: str):
        self.o, self.file, self.start, self.data = (
            o, Path(o.out) / f'{part}.json', time.monotonic(), dict(part=part, status='running'))
        self.save()

    def save(self):
        self.data['seconds'] = round(time.monotonic() - self.start, 2)
        tmp = self.file.with_suffix('.tmp')
        tmp.write_text(json.dumps(self.data, indent=1) + '\n')
        os.replace(tmp, self.file)

    def left(self) -> float:
        return self.o.seconds - (time.monotonic() - self.start)

    def add(self, **found):
        "Keep and print"
        self.data |= found
        self.save()
        for k, v in found.items():
            print(f'  {k}: {json.dumps(v)[:400]}', flush=True)

    @contextlib.contextmanager
    def attempt(self, name: str):
        "A finding that may fail without taking the part along; its trace is kept"
        try:
            yield
        except Exception:
            self.add(**{f'{name}_failed': traceback.format_exc()[-3000:]})
            free()

def free():
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

def device_of(o):
    from sid_lsg_nb.core import pick_device

    return pick_device(o.device)

def run(words: list, seconds: float, **more) -> subprocess.CompletedProcess:
    "A Python process; raises with the end of what it said"
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=max(5, seconds), **more
    )
    if done.returncode:
        raise RuntimeError(
            f'{words[:4]} ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-2500:]}'
        )
    return done

# ---- 1. where am I

def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return 'missing'

def where(r: Report):
    "Card, driver, versions, free memory"
    import torch

    versions = {k: version(k) for k in NEEDED}
    missing = [k for k, v in versions.items() if v == 'missing']
    r.add(
        python=sys.version.split()[0], cores=os.cpu_count(), versions=versions, date=time.strftime('%Y-%m-%d'),
        rehearsal=r.o.tiny)
    if missing:
        r.add(
            missing=missing,
            cure=f'carry wheels of {" ".join(missing)}: python benchmarks/gpu_day.py wheels DIR, then pip install '
                 f'--no-index --no-deps DIR/*.whl')
    if r.o.device == 'cpu' or not torch.cuda.is_available():
        r.add(card='none')
        return
    p, memory = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    smi = shutil.which('nvidia-smi') and subprocess.run(
        ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True
    )
    r.add(
        card=p.name, cards=torch.cuda.device_count(), capability=f'{p.major}.{p.minor}', cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        driver=smi.stdout.split('\n')[0].strip() if smi else 'nvidia-smi is missing',
        free_gib=round(memory[0] / 2**30, 2), total_gib=round(memory[1] / 2**30, 2))

# ---- 2. right

def bundled(o, **more):
    "The bundled teacher, in twenty iterations or three"
    from sid_lsg_nb.training.config import Config

    return Config(
        **dict(
            device=o.device, total_batch_size=4 if o.tiny else 16, micro_batch=2 if o.tiny else None, kappa=1.5)
        | more
    )

def losses(config, n: int):
    "Losses of n iterations, on noise that the CPU makes: [n, 3] float64; and the job"
    import torch
    from dataclasses import replace
    from sid_lsg_nb.core import rng
    from sid_lsg_nb.method.steps import distill
    from sid_lsg_nb.training.job import data_of, setup

    job, out = setup(config), []

    class OnCPU:
        "The method, with noise that the CPU makes"

        def __getattr__(self, name):
            return getattr(job.method, name)

        def draw(self, update, shape, schedule, generator, dtype):
            d = job.method.draw(update, shape, schedule, generator, dtype)
            return replace(d, **{k: getattr(d, k).to(job.processes.device) for k in ('z', 'eps', 't')})

    for _, s in zip(
        range(n),
        distill(job.nets, OnCPU(), data_of(job), job.teacher.latent_shape, rng=rng(config.seed), ema=job.ema)):
        out.append(torch.stack([s.logs[k] for k in ('loss_fake', 'loss', 'fisher')]).double())
    return torch.stack(out).cpu(), job

VARIANTS = {  # name: settings, how far the means of fake's loss and gap may be from fp32's, as a part
    'bf16': (dict(mixed_precision='bf16'), 0.05),
    'fp16': (dict(mixed_precision='fp16'), 0.02),
    'pure-fp16': (dict(weight_dtype='fp16'), 0.2),
    'channels-last': (dict(channels_last=True), 0.01),
    'sequential': (dict(sequential_gradient=True), 0.01),
    'checkpointing': (dict(gradient_checkpointing=True), 0.01),
    'lora': (dict(lora='both', lora_rank=16), None),
    'compile': (dict(compile=True), 0.01)}

def variants(r: Report, n: int, plain):
    "Every way to compute, beside fp32"
    for name, (settings, bound) in VARIANTS.items():
        if r.o.tiny and name == 'fp16':
            continue  # slow on CPUs, and in `many`, too
        if r.left() < 30 and not r.o.tiny:
            r.add(**{name: 'no time left'})
            continue
        with r.attempt(name):
            found, job = losses(bundled(r.o, **settings), n)
            apart = ((found - plain).mean(0) / plain.mean(0)).abs()[[0, 2]].tolist()
            row = dict(finite=bool(found.isfinite().all()), apart=[round(a, 6) for a in apart], bound=bound)
            if job.nets['fake'].scaler:
                row['scales'] = {k: l.scaler.get_scale() for k, l in job.nets.learners.items()}
            r.add(**{name: row | dict(ok=row['finite'] and (bound is None or max(apart) < bound))})
            del job
            free()

@contextlib.contextmanager
def no_waits(device):
    """Inside, asking the device for a number is an error: CUDA watches every hidden wait, elsewhere the questions
    are watched that would be one"""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    asks = {
        getattr(torch.ops.aten, k).default
        for k in ('_local_scalar_dense', 'nonzero', 'equal', 'masked_select')
    }

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if f in asks:
                raise RuntimeError(f'{f} waits for the device')
            return f(*args, **(kwargs or {}))

    if device.type != 'cuda':
        with Watch():
            yield
        return
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')

def waits(r: Report):
    "Whole iterations, with prompts, noise and average, that never wait"
    from sid_lsg_nb.training.job import iterate, setup

    for name, settings in dict(
        fp32={}, fp16=dict(mixed_precision='fp16', sequential_gradient=True),
        bf16=dict(mixed_precision='bf16', gradient_checkpointing=True), timesteps=dict(timestep_sampling='edm')).items():
        if r.o.tiny and name in ('fp16', 'timesteps'):
            continue  # slow on CPUs; drawing t by a distribution's name looks at numbers of the CPU's own
        with r.attempt(f'waits_{name}'):
            job = setup(bundled(r.o, **settings))
            it = iterate(job)
            next(it)
            with no_waits(job.processes.device):
                next(it), next(it)
            r.add(**{f'waits_{name}': 'none'})

def distil(o, work: Path, *flags) -> subprocess.Popen:
    "`sid-lsg distill` with deterministic algorithms, in a process of its own"
    n, batch = (16, 4) if o.tiny else (320, 16)
    words = (
        f'--device {o.device} --max-train-images {n} --total-batch-size {batch} --log-every {batch} '
        f'--checkpoint-every {batch} --sample-every {n} --n-eval 0 --teacher-steps 2'
    ).split()
    env = dict(os.environ, CUBLAS_WORKSPACE_CONFIG=':4096:8')
    with open(work / f'{flags[-1]}.log', 'w') as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / 'gpu_day.py'), 'deterministic', 'distill', *words, *flags], cwd=work,
            env=env, stdout=log, stderr=log)

def ended(p: subprocess.Popen, log: Path, seconds: float):
    try:
        p.wait(max(5, seconds))
    except subprocess.TimeoutExpired:
        p.kill()
        raise
    if p.returncode:
        raise RuntimeError(log.read_text()[-3000:])

def killed(r: Report):
    "kill -9 in the middle, resume: bit-equal to the run that nobody disturbed"
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as home:
        work = Path(home)
        whole, other = distil(r.o, work, '--out', 'whole'), distil(r.o, work, '--out', 'killed')
        while other.poll() is None and not any(
            int(p.name) for p in (work / 'killed/checkpoints').glob('[0-9]*')
        ):
            time.sleep(0.01)
        other.kill()
        other.wait()
        cut = not (work / 'killed/generator').exists()
        ended(distil(r.o, work, '--resume', 'killed'), work / 'killed.log', r.left())
        ended(whole, work / 'whole.log', r.left())
        a, b = (
            load_file(work / k / 'generator/unet/diffusion_pytorch_model.safetensors')
            for k in ('whole', 'killed')
        )
        r.add(killed_in_time=cut, resumed_bit_equal=all(torch.equal(a[k], b[k]) for k in a))

def right(r: Report):
    "Losses against the CPU's, every way to compute, no hidden waits, kill -9"
    n = 2 if r.o.tiny else 20
    with r.attempt('losses'):
        here, plain = (
            losses(bundled(r.o, lr=1e-6, lr_fake=1e-6, device=d), n)[0] for d in ('cpu', r.o.device)
        )
        apart = ((plain - here).abs() / here.abs()).amax(1).tolist()
        r.add(losses_apart=[float(f'{a:.3g}') for a in apart], losses_ok=max(apart) < GOALS['losses'])
    with r.attempt('waits'):
        waits(r)
    with r.attempt('killed'):
        killed(r)
    with r.attempt('variants'):
        variants(r, n, losses(bundled(r.o), n)[0])

# ---- 3. fast

class Official:
    """One iteration as the official code is built, from a description of it: what costs time is there, in its
    order and number"""

    def __init__(self, teacher, precision: str = 'fp32', kappa: float = 1.5):
        import copy, torch

        low = torch.float16 if precision == 'pure-fp16' else torch.float32
        self.torch, self.teacher, self.kappa, self.low, self.schedule = (
            torch, teacher, kappa, low, teacher.schedule)
        self.real = teacher.denoiser.net.to(low)
        self.fake, self.gen, self.mean = (copy.deepcopy(self.real) for _ in range(3))
        self.adams = [
            torch.optim.Adam(
                n.parameters(), lr=1e-6, betas=(0.0, 0.999), eps=1e-6 if low == torch.float16 else 1e-8
            )
            for n in (self.fake, self.gen)
        ]
        self.device, self.shape = teacher.device, (1, *teacher.latent_shape)

    def learning(self, *on):
        "Modes and gradient flags are set network by network, before every phase"
        for net in (self.real, self.fake, self.gen):
            net.train(net in on).requires_grad_(net in on)

    def sampled(self, prompt):
        """The generator's picture: text, one call, and a scheduler that is asked sample by sample, with a time on
        the device"""
        torch, z = self.torch, self.torch.randn(self.shape, device=self.device)
        t = torch.full((1,), 625, device=self.device)
        a, s = (float(v) for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
        pred = self.gen(
            (s * z).to(self.low), t,
            encoder_hidden_states=self.teacher.text([prompt])['encoder_hidden_states'].to(self.low)).sample
        return torch.stack([(s * zi - s * p.float()) / a for zi, p in zip(z, pred) if int(t[0]) > 0])

    def denoised(self, net, x_t, t, prompt):
        "Guided x0: prompt and empty prompt are encoded anew each time, the batch is doubled"
        torch, words = (
            self.torch,
            torch_cat(
                [
                    self.teacher.text([''])['encoder_hidden_states'],
                    self.teacher.text([prompt])['encoder_hidden_states']]
            ))
        null, cond = (
            net(
                torch.cat([x_t] * 2).to(self.low), torch.cat([t] * 2), encoder_hidden_states=words.to(self.low))
            .sample.float()
            .chunk(2)
        )
        return self.schedule.to_x0(null + self.kappa * (cond - null), x_t, t)

    def noised(self, x):
        t = self.torch.randint(20, 980, (len(x),), device=self.device)
        return self.schedule.add_noise(x, self.torch.randn_like(x), t), t

    def finish(self, net, adam):
        "Gradients are cleaned parameter by parameter, then Adam in its default form"
        for p in net.parameters():
            if p.grad is not None:
                self.torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        adam.step()

    def iterate(self, prompts: list):
        "One iteration over micro-batches of one: 18 forward units (7 + 11) and 8 text passes each"
        torch = self.torch
        gc.collect()
        free()
        total = len(prompts)
        for phase, net, adam in (('fake', self.fake, self.adams[0]), ('generator', self.gen, self.adams[1])):
            self.learning(net)
            adam.zero_grad(set_to_none=True)
            for prompt in prompts:
                with torch.set_grad_enabled(phase == 'generator'):
                    x = self.sampled(prompt)
                x_t, t = self.noised(x)
                y = self.denoised(self.fake, x_t, t, prompt)
                if phase == 'fake':
                    loss = self.schedule.snr(t).float()[:, None, None, None] * (y - x) ** 2
                else:
                    real = self.denoised(self.real, x_t, t, prompt)
                    w = (x - real).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
                    loss = (real - y) * (y - x) / w
                bad = loss.isnan().flatten(1).any(1)
                if not bad.any():
                    (loss.sum() / total).backward()
                loss.sum().item()
            self.finish(net, adam)
        with torch.no_grad():
            for m, p in zip(self.mean.parameters(), self.gen.parameters()):
                m.copy_(p.lerp(m, 0.99))

def torch_cat(parts):
    import torch

    return torch.cat(parts)

def official(r: Report, teacher, precision: str, rounds: int) -> dict:
    "Images per second of that structure, on the weights of this teacher"
    import torch
    from sid_lsg_nb.commands.bench import time_call

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    o, prompts = Official(teacher, precision), [f'a picture of thing {i}' for i in range(rounds)]
    o.iterate(prompts)
    seconds = [time_call(lambda: o.iterate(prompts), torch.device(teacher.device)) for _ in range(2)]
    return dict(
        precision=precision, micro=1, rounds=rounds, seconds=round(min(seconds), 4),
        img_per_s=round(rounds / min(seconds), 3))

def fast_rows(o) -> list:  # (name, settings of `Bench`), in order of worth
    "The rows of run.py for a GPU"
    sys.path.insert(0, str(HERE))
    import run as table

    names = [
        'gpu-fp32-4', 'gpu-bf16-4', 'gpu-pure-fp16-4', 'gpu-fp16-4', 'gpu-tf32-4', 'gpu-bf16-16', 'gpu-bf16-1',
        'gpu-bf16-4-channels-last', 'gpu-bf16-8']
    names += [n for n in table.ROWS if n.startswith('gpu-') and n not in names and 'compile' not in n] + [
        'gpu-bf16-4-compile'
    ]
    if o.tiny:
        names = ['gpu-fp32-4', 'gpu-bf16-4-channels-last', 'gpu-bf16-4-compile']
    return [(n, table.settings(n)) for n in names]

def small_teacher(o, home: Path):
    "SD1.5 of random weights on the device; in a rehearsal the tiny one"
    from sid_lsg_nb.commands.bench import random_teacher
    from sid_lsg_nb.teachers.stable_diffusion import load_sd
    from sid_lsg_nb.testing import tiny_pipeline

    return (
        load_sd(tiny_pipeline(home / 'tiny'), device_of(o))
        if o.tiny
        else random_teacher('random-sd15', device_of(o))
    )

def fast(r: Report):
    "Iteration against its network calls, and against the official structure in the same process on the same weights"
    import torch
    from sid_lsg_nb.commands.bench import measure

    rows, theirs, longest = {}, {}, 5.0
    home = Path(tempfile.mkdtemp())
    for name, b in fast_rows(r.o):
        if r.left() < 1.5 * longest + ('compile' in name) * 60 * (not r.o.tiny):
            r.add(**{f'{name}_skipped': 'no time left'})
            continue
        begun = time.monotonic()
        with r.attempt(name):
            b = b | dict(device=str(device_of(r.o)), repeat=1 if r.o.tiny else 5)
            try:
                torch.manual_seed(0)
                teacher = small_teacher(r.o, home)
                if name in ('gpu-fp32-4', 'gpu-pure-fp16-4'):
                    p = 'pure-fp16' if 'weight_dtype' in b else 'fp32'
                    theirs[p] = official(r, teacher, p, 2 if r.o.tiny else 4)
                    r.add(official=theirs)
                rows[name] = measure(bench_of(b | (dict(micro_batch=2) if r.o.tiny else {})), teacher)
                del teacher
                free()
                r.add(rows=rows)
            except torch.OutOfMemoryError:
                rows[name] = dict(settings=b, failed='does not fit')
                free()
                r.add(rows=rows)
        longest = max(longest, time.monotonic() - begun) if 'compile' not in name else longest
    shutil.rmtree(home)
    r.add(goals=compare_with_goals(rows, theirs))

def bench_of(settings: dict):
    from sid_lsg_nb.commands.bench import Bench

    return Bench(**settings)

def compare_with_goals(rows: dict, theirs: dict) -> dict:
    "What was wanted, and whether it was reached; only of what was measured"
    speed = {k: v['img_per_s'] for k, v in rows.items() if 'img_per_s' in v}
    out = {}
    for k, v in rows.items():
        if 'ratio' in v:
            out[f'{k}: iteration / network calls'] = [v['ratio'], v['ratio'] <= GOALS['ratio']]
    for k, p, against, goal in (
        ('gpu-fp32-4', 'fp32', 'fp32', 'official'), ('gpu-pure-fp16-4', 'pure-fp16', 'pure-fp16', 'official'),
        ('gpu-bf16-4', 'bf16', 'fp32', 'official_bf16')):
        if k in speed and against in theirs:
            out[f'{p} / official structure in {against}'] = [
                f := round(speed[k] / theirs[against]['img_per_s'], 3), f >= GOALS[goal]]
    return out

# ---- 4. small

def small(r: Report):
    "Presets for 24 and 12 GB, with the card's memory capped to that"
    import torch
    from sid_lsg_nb.commands.bench import measure
    from sid_lsg_nb.teachers.registry import model_shapes
    from sid_lsg_nb.training.memory import MemorySettings, memory_budget

    device, home = device_of(r.o), Path(tempfile.mkdtemp())
    for gb, more in ((24, dict(sequential_gradient=True)), (12, dict(lora='both'))):
        settings, low = (
            dict(micro_batch=1, gradient_checkpointing=True) | more, 'bf16' if r.o.tiny else 'fp16')
        with r.attempt(f'gb{gb}'):
            if device.type == 'cuda':
                torch.cuda.set_per_process_memory_fraction(min(1.0, gb * 1e9 / torch.cuda.mem_get_info()[1]))
            tiny = r.o.tiny and small_teacher(r.o, home)
            shapes = model_shapes(str(home / 'tiny') if tiny else 'sd15')
            fits = MemorySettings(**settings | dict(precision=low, sequential_gradient=True))
            held = memory_budget(shapes, fits)
            counted = sum(held.values()) / 2**30
            found = measure(
                bench_of(
                    settings | dict(mixed_precision=low, device=str(device), repeat=1 if r.o.tiny else 3)
                ),
                small_teacher(r.o, home))
            peak = found['peak_gib']
            r.add(
                **{
                    f'gb{gb}': found
                    | dict(
                        cap_gb=gb, counted_gib=round(counted, 3),
                        ok=None if peak is None else abs(peak / counted - 1) < GOALS['peak'])
                }
            )
        free()
    shutil.rmtree(home)

# ---- 5. many

def as_copies(job):
    "Networks in DDP, which one process alone does without"
    from torch.nn.parallel import DistributedDataParallel

    for l in job.nets.learners.values():
        l.train = l.net.with_net(
            DistributedDataParallel(l.net.net, gradient_as_bucket_view=True, broadcast_buffers=False))

def ranks(o):
    "One process of `many`: copies and slices, a checkpoint written by one job and read by another"
    import torch, torch.distributed as dist
    from sid_lsg_nb.training.checkpoint import load_latest
    from sid_lsg_nb.training.distributed import Distributed
    from sid_lsg_nb.training.job import iterate, setup
    from sid_lsg_nb.training.resume import restore, save

    if os.environ['WORLD_SIZE'] == '1':  # one process starts no group by itself
        dist.init_process_group('gloo' if o.device == 'cpu' or not torch.cuda.is_available() else 'nccl')
    processes, out = Distributed(o.device), {}
    for how, precision in itertools.product(('copies', 'slices'), ('no', 'fp16')):
        config = bundled(
            o, total_batch_size=2 * processes.world, micro_batch=None, fsdp=how == 'slices',
            mixed_precision=precision, device=str(processes.device))
        a, b = setup(config, processes), setup(config, processes)
        if how == 'copies' and processes.world == 1: as_copies(a), as_copies(b)
        it = iterate(a)
        a.nimg = next(it).nimg
        folder = Path(o.out) / f'{how}-{precision}'
        save(a, folder)
        restore(b, load_latest(folder / 'checkpoints')[1])
        one, two = next(it), next(iterate(b))
        pair = [float(s.logs['fisher']) for s in (one, two)]
        name = how if precision == 'no' else f'{how}, {precision}'
        out[name] = dict(fisher=pair, ok=abs(pair[0] / pair[1] - 1) < 1e-3)
    if processes.is_main:
        facts = dict(
            backend=dist.get_backend(), world=processes.world, device=str(processes.device), torch=torch.__version__)
        (Path(o.out) / 'ranks.json').write_text(json.dumps(out | facts))
    processes.close()
    if dist.is_initialized():
        dist.destroy_process_group()

def many(r: Report):
    "One process per card"
    import torch

    n = 1 if r.o.device == 'cpu' or not torch.cuda.is_available() else torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as home:
        run(
            [
                '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', n, __file__, 'ranks', '--device',
                r.o.device, '--out', home, *['--tiny'] * r.o.tiny],
            r.left())
        r.add(**json.loads((Path(home) / 'ranks.json').read_text()))

# ---- 6. whole

def sampling(r: Report):
    "One step of a stock pipeline, against its UNet and its VAE alone"
    import torch
    from diffusers import StableDiffusionPipeline
    from sid_lsg_nb.commands.bench import time_call
    from sid_lsg_nb.teachers.student import Student, one_step_scheduler

    home, low = Path(tempfile.mkdtemp()), torch.float32 if r.o.tiny else torch.float16
    teacher = small_teacher(r.o, home)
    parts = teacher.pipe.components | dict(
        scheduler=one_step_scheduler(teacher.pipe.scheduler), safety_checker=None, feature_extractor=None
    )
    device = torch.device(teacher.device)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False).to(device, low)
    student, found = Student(pipe), {}
    for n in (1, 2 if r.o.tiny else 16):
        words = teacher.text(['a thing'] * n)['encoder_hidden_states'].to(low)
        z = torch.randn(n, *student.latent_shape, device=device, dtype=low)
        t = torch.full((n,), 625, device=device)

        @torch.no_grad()
        def bare():
            pipe.vae.decode(
                pipe.unet(z, t, encoder_hidden_states=words).sample / pipe.vae.config.scaling_factor
            )

        draw = lambda: student(['a thing'] * n, range(n))
        draw(), bare()
        turns = [(time_call(draw, device), time_call(bare, device)) for _ in range(2 if r.o.tiny else 7)]
        mid = lambda k: sorted(t[k] for t in turns)[len(turns) // 2]
        found[f'batch {n}'] = dict(
            seconds=round(mid(0), 5), unet_and_vae=round(mid(1), 5), ratio=round(mid(0) / mid(1), 3),
            img_per_s=round(n / mid(0), 2))
    shutil.rmtree(home)
    r.add(sampling=found)

def whole(r: Report):
    "The command of the README, from start to table; then drawing"
    with tempfile.TemporaryDirectory() as home, r.attempt('distill'):
        words = (
            [
                '--max-train-images', 16, '--total-batch-size', 4, '--n-eval', 0, '--sample-every', 16,
                '--log-every', 8]
            if r.o.tiny
            else []
        )
        start = time.monotonic()
        run(
            ['-m', 'sid_lsg_nb.cli', 'distill', '--out', 'run', '--device', r.o.device, *words], r.left() - 15,
            cwd=home)
        folder = Path(home) / 'run'
        log = [json.loads(l) for l in (folder / 'log.jsonl').read_text().splitlines()]
        r.add(
            minutes=round((time.monotonic() - start) / 60, 3), images=log[-1]['nimg'],
            img_per_s=sorted(l['img_per_s'] for l in log)[len(log) // 2])
        if not r.o.tiny:  # a table takes at least 1,152 pictures
            r.add(table=json.loads((folder / 'scores.json').read_text()))
    with r.attempt('sampling'):
        sampling(r)

# ---- 7. real data

def pretend(folder: Path):
    "Data of the right shapes for a rehearsal: 60,000 pictures of noise, and a feature network that averages"
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    data = {
        f'{k}_x': torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
        for k, n in (('train', 50_000), ('test', 10_000))
    }
    save_file(
        data | {f'{k}_y': torch.arange(n) % 10 for k, n in (('train', 50_000), ('test', 10_000))},
        folder / 'cifar10.safetensors')
    net = torch.nn.Module()
    net.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    torch.jit.script(net).save(str(folder / 'inception.pt'))

def pack(root: Path, out: Path, most: int) -> list:  # what was left behind
    """The newest state of teacher and students, in files of at most 15 MiB, as many as may come back; what does
    not fit is named"""
    left = []
    for who in ('teacher', 'sid', 'sim'):
        newest = [sorted((root / who / k).glob('[0-9]*'))[-1:] for k in ('checkpoints', 'nets')]
        if not newest[0]:
            continue
        with tempfile.TemporaryFile() as tmp:
            with tarfile.open(fileobj=tmp, mode='w') as tar:
                for folder in sum(newest, []):
                    tar.add(folder, folder.relative_to(root))
            pieces = -(-tmp.tell() // PIECE)
            tmp.seek(0)
            most -= pieces
            if most < 0:
                left.append(who)
                most += pieces
                continue
            for i in range(pieces):
                (out / f'state-{who}-{i}.bin').write_bytes(tmp.read(PIECE))
    return left

def unpack(state: Path, root: Path):
    "What `pack` left, so that training goes on; what is there already stays"
    for who in ('teacher', 'sid', 'sim'):
        pieces = sorted(state.glob(f'state-{who}-*.bin'), key=lambda p: int(p.stem.split('-')[-1]))
        if not pieces or (root / who).exists():
            continue
        with tempfile.TemporaryFile() as tmp:
            for p in pieces:
                tmp.write(p.read_bytes())
            tmp.seek(0)
            root.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=tmp) as tar:
                tar.extractall(root, **(dict(filter='data') if hasattr(tarfile, 'data_filter') else {}))  # 3.11.4 and newer

def real(r: Report):
    "benchmarks/cifar10.py for the time that is left, beginning where the last state was"
    folder, size = Path(r.o.folder).resolve(), 'tiny' if r.o.tiny else 'day'
    if r.o.tiny:
        pretend(folder)
    if missing := [k for k in ('cifar10.safetensors', 'inception.pt') if not (folder / k).is_file()]:
        r.add(
            skipped=f'{" and ".join(missing)} not in {r.o.folder}; bring what `python benchmarks/cifar10.py data` '
                    f'makes'
        )
        return
    if r.o.state:
        unpack(Path(r.o.state), folder / f'{size}-uncond')
    with r.attempt('cifar10'):
        trained(r, folder, size)

def trained(r: Report, folder: Path, size: str):
    "Teacher, SiD and SIM go on; what was trained is left to be taken home before it is scored"
    sys.path.insert(0, str(HERE))
    import cifar10
    from sid_lsg_nb.metrics.features import INCEPTION, INCEPTION_SHA256
    from sid_lsg_nb.data.images import file_sha256

    if r.o.tiny:
        INCEPTION_SHA256[file_sha256(folder / 'inception.pt')] = (
            INCEPTION  # the pretended network is taken for the real one
        )
    how = (
        '--iters 1 --batch 4 --n 16 --reference-n 16 --draw 8'.split()
        if r.o.tiny
        else '--precision bf16 --save-minutes 0.5 --n 10000'.split()
    )
    minutes = max(0.1, (r.left() - 90) / 60)
    with tempfile.TemporaryDirectory() as home:

        def call(command, share):
            words = [
                command, '--size', size, '--device', r.o.device, '--folder', str(folder), '--out', home, *how,
                '--minutes', f'{share * minutes:.2f}']
            if cifar10.main(words):
                raise RuntimeError(f'cifar10.py {command} said no, see above')

        try:
            call('teacher', 0.6), call('distil', 0.4)
        finally:
            r.add(stayed_behind=pack(folder / f'{size}-uncond', Path(r.o.out), r.o.pieces))
        call('score', 0)
        r.add(
            rows=[
                row
                for row in json.loads((Path(home) / 'cifar10.json').read_text())
                if row.get('fid') is not None
            ]
        )

# ---- all

def part(o):
    "One part, in this process"
    import torch

    if o.tiny:
        torch.nn.Module.compile = lambda self, compiled=torch.nn.Module.compile: compiled(
            self, backend='eager'
        )  # no C++ compiler is asked
    r = Report(o, o.command)
    try:
        globals()[o.command](r)
        r.data['status'] = 'failed in parts' if any(k.endswith('_failed') for k in r.data) else 'done'
    except Exception:
        r.data |= dict(status='failed', trace=traceback.format_exc()[-4000:])
        traceback.print_exc()
    r.save()

def one(o, name: str, seconds: float):
    "A part in a process of its own, stopped at its time; what it found until then stays"
    words = [
        sys.executable, __file__, name, '--seconds', f'{seconds:.0f}', '--out', o.out, '--device', o.device,
        '--folder', o.folder, '--state', o.state, '--pieces', str(o.pieces), *['--tiny'] * o.tiny]
    env = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]),
        PYTHONUNBUFFERED='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
    p, said = subprocess.Popen(words, env=env, start_new_session=True), 'died'
    try:
        p.wait(seconds + 8)
    except subprocess.TimeoutExpired:
        said = 'stopped at its time'
    with contextlib.suppress(ProcessLookupError):
        os.killpg(p.pid, signal.SIGKILL)  # and whatever it started
    p.wait()
    file = Path(o.out) / f'{name}.json'
    found = json.loads(file.read_text()) if file.is_file() else dict(part=name, status='running')
    if found['status'] == 'running':
        file.write_text(json.dumps(found | dict(status=said, exit=p.returncode), indent=1) + '\n')

def everything(o):
    "The parts in order; time that one leaves goes to the next (a rehearsal, on a busy machine, may take all there is)"
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    names = [n for n in PARTS if n in (o.only or PARTS)]
    end = time.monotonic() + 60 * o.minutes
    for name in names:
        (out / f'{name}.json').unlink(missing_ok=True)
    for i, name in enumerate(names):
        share = 1 if o.tiny else PARTS[name] / sum(PARTS[n] for n in names[i:])
        print(f'== {name}', flush=True)
        one(o, name, max(5.0, share * (end - time.monotonic()) - 2))
    bad = 0
    for name in names:
        found = json.loads((out / f'{name}.json').read_text())
        bad += found['status'] != 'done'
        print(
            f'{name:<6} {found["status"]:<16} {found.get("seconds", 0):7.1f} s',
            *(k for k in found if k.endswith('_failed')))
    return int(bad > 0)

def deterministic(words: list[str]) -> int:
    "`sid-lsg` with deterministic algorithms"
    import torch

    torch.use_deterministic_algorithms(True)
    from sid_lsg_nb.cli import main as cli

    return cli(words)

def wheels(folder: str, python: str) -> int:
    "Fetch the wheels, for that Python"
    return subprocess.call(
        [
            sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '--python-version', python,
            '-d', folder, *WHEELS]
    )

def main(argv: list[str]) -> int:
    if argv[:1] == ['deterministic']:
        return deterministic(argv[1:])
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument(
        'command', nargs='?', default='all', choices=['all', 'ranks', 'wheels', *PARTS],
        help='a part: in this process, for those who look for a fault')
    a.add_argument('place', nargs='?', help='of wheels: where to')
    a.add_argument(
        '--python', default='.'.join(map(str, sys.version_info[:2])),
        help='of wheels: the Python there, such as 3.12')
    a.add_argument('--minutes', type=float, default=9.0, help='all parts end within')
    a.add_argument('--only', nargs='+', choices=PARTS, help='these parts, with all the minutes')
    a.add_argument('--seconds', type=float, default=600.0, help='of one part')
    a.add_argument('--out', default='day', help='folder of the JSON files')
    a.add_argument('--device', default='cuda')
    a.add_argument('--tiny', action='store_true', help='a rehearsal')
    a.add_argument('--folder', default='runs/cifar10', help='where cifar10.safetensors and inception.pt are')
    a.add_argument(
        '--state', default='', help='folder of the state-*.bin of an earlier day, to go on with the real data'
    )
    a.add_argument(
        '--pieces', type=int, default=1, help='state-*.bin files of 15 MiB that may be left in --out'
    )
    o = a.parse_args(argv)
    if o.command == 'wheels':
        return wheels(o.place or 'wheels', o.python)
    if o.command == 'all':
        return everything(o)
    return ranks(o) if o.command == 'ranks' else part(o)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
