"""Every family of teachers, and what its students can do: a row each, with small random networks.

    python benchmarks/families.py [FAMILY ...]

Two iterations alone; the same by two processes (gloo, CPU) with copies (DDP) and in slices (FSDP2), with
LoRA, and with real pictures (SiDA): two processes must find the gradients and the weights that one finds.
Then the exports, with the reason where there is none. Rows go to nbs/images/families.json, in the place of
older ones; the registry's chapter shows them. Two processes go through all families while this one plays
alone: some ten minutes."""

import argparse, contextlib, io, json, platform, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path
import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPTextModelWithProjection
from sid_lsg_nb.commands.convert import export_to
from sid_lsg_nb.commands.options import Export
from sid_lsg_nb.core import InputError
from sid_lsg_nb.teachers.edm import save_edm, tiny_edm
from sid_lsg_nb.teachers.registry import brings_prompts
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.testing import quiet_libraries, tiny_flux, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana
from sid_lsg_nb.testing import tiny_flux2, tiny_sd3, tiny_sdxl, tiny_z_image
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed, gather_full
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.memory import plain_copy

FILE = Path(__file__).resolve().parent.parent/'nbs/images/families.json'

def published_sd3(folder) -> str:
    "A small Stable Diffusion 3 whose first CLIP has the identity as its projection, as the published ones"
    tiny_sd3(folder)
    text = CLIPTextModelWithProjection.from_pretrained(Path(folder)/'text_encoder')
    torch.nn.init.eye_(text.text_projection.weight)
    text.save_pretrained(Path(folder)/'text_encoder')
    return str(folder)


FAMILIES = {  # title: folder -> a small random teacher
    'Stable Diffusion': tiny_pipeline, 'SDXL': tiny_sdxl, 'PixArt': tiny_pixart, 'Stable Diffusion 3': published_sd3,
    'SANA': tiny_sana, 'SANA 1.5': lambda folder: tiny_sana(folder, qk_norm='rms_norm_across_heads'),
    'FLUX.1': tiny_flux, 'Qwen-Image': tiny_qwen_image, 'Z-Image': tiny_z_image, 'FLUX.2-klein': tiny_flux2,
    'EDM': lambda folder: save_edm(tiny_edm(classes=10).denoiser.net, folder)}
SETTINGS = dict(
    teacher='teacher', device='cpu', total_batch_size=4, micro_batch=2, max_train_images=8, lr=1e-4,
    lr_fake=1e-4, lr_scheduler='constant', proportion_empty_prompts=0.)
MODES = {  # what is trained
    'train': {}, 'LoRA': dict(lora='both', lora_rank=4),
    'real pictures': dict(real_images='real', freeze_generator_until=0, gan_start=0)}
TWO = {  # columns of two processes: the mode, and how
    'two copies': ('train', {}), 'two slices': ('train', dict(fsdp=True)), 'LoRA, two copies': ('LoRA', {}),
    'real pictures, two slices': ('real pictures', dict(fsdp=True))}
CLOSE = dict(gradients=2e-3, weights=1e-3)  # of the largest; absolute: Adam's first steps make lr out of rounding

# ---- runs

def play(processes, **more) -> tuple:  # the job, and what it has come to
    "Two iterations"
    words = dict(prompts='p.txt') if Path('p.txt').is_file() else dict(kappa=1.)  # classes: trained without guidance
    job = setup(Config(**SETTINGS | words | more), processes)
    for state in iterate(job):
        if state.nimg >= 8: break
    logs = {k: float(v) for k, v in state.logs.items() if k in ('norm', 'norm_fake')}
    sizes, whole = {}, {}
    for role, learner in job.nets.learners.items():
        moments = gather_full(learner.optimizer.state_dict())['state']
        sizes[role] = torch.cat([v['exp_avg_sq'].flatten().sqrt() for _, v in sorted(moments.items())])
        trained = [p for p in learner.net.parameters() if p.requires_grad]
        whole[role] = torch.cat([gather_full(p.detach()).flatten() for p in trained])
    return job, dict(logs=logs, sizes=sizes, weights=whole)


def as_rank(root: Path, names: list[str]):
    "What each of two processes does: all columns of all families; the first keeps what came out"
    processes = Distributed('cpu')
    for name in names:
        for column, (mode, how) in TWO.items():
            try:
                with contextlib.chdir(root/name), contextlib.redirect_stdout(io.StringIO()):
                    result = play(processes, **MODES[mode], **how)[1]
                result = {k: result[k] for k in ('sizes', 'weights')} | dict(world=processes.world)
            except InputError as e: result = str(e)
            if processes.is_main:
                torch.save(result, root/name/'unfinished')
                (root/name/'unfinished').rename(root/name/f'{column}.pt')
            processes.barrier()
    processes.close()


def start_two(root: Path, names: list[str]) -> subprocess.Popen:
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
             str(Path(__file__).resolve()), '--rank-of', str(root), *names]
    return subprocess.Popen(words, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=open(root/'said.txt', 'w'))


def gap(one: dict, two) -> dict:
    "How far two runs are apart, all networks together"
    if isinstance(two, str): return dict(no=two)
    assert two['world'] == 2
    far = {}
    for k, key, unit in (('gradients', 'sizes', True), ('weights', 'weights', False)):
        pairs = [(one[key][role], two[key][role]) for role in one[key]]
        apart = max(float((a - b).abs().max())/(float(a.abs().max()) if unit else 1.) for a, b in pairs)
        far[k] = float(f'{apart:.1e}')
    return dict(yes=all(far[k] <= v for k, v in CLOSE.items()), **far)


def alone(home: Path) -> tuple[dict, dict, dict]:  # cells; what came out; the jobs
    "One process, each mode"
    cells, found, jobs = {}, {}, {}
    for mode, more in MODES.items():
        try: jobs[mode], found[mode] = play(None, **more)
        except InputError as e: cells[mode] = dict(no=str(e))
        else: cells[mode] = dict(yes=all(v > 0 for v in found[mode]['logs'].values()))
    return cells, found, jobs


def together(home: Path, cells: dict, found: dict, two: subprocess.Popen) -> dict:
    "The columns of two processes, when they have come so far"
    out = {}
    for column, (mode, _) in TWO.items():
        file = home/f'{column}.pt'
        while not file.is_file() and two.poll() is None: time.sleep(1)
        if mode not in found: out[column] = cells[mode]
        elif file.is_file(): out[column] = gap(found[mode], torch.load(file, weights_only=True))
        else: out[column] = dict(no='ended: ' + (home.parent/'said.txt').read_text()[-1500:])
    return out

# ---- exports

EXPORTS = {'LoRA file': dict(to='lora'), "LoRA file in kohya's names": dict(to='lora', kohya=True),
           'single file': dict(to='single-file'), '16-bit files': dict(to='fp16')}


def exported(home: Path, jobs: dict) -> dict:
    "What `sid-lsg export` writes of the students"
    cells = {}
    for mode, job in jobs.items():
        if mode in ('train', 'LoRA'):
            save_student(job.teacher, plain_copy(job.ema.net), home/mode, job.settings.recipe.t_init)
    for i, (column, how) in enumerate(EXPORTS.items()):
        mode = 'LoRA' if how['to'] == 'lora' and 'LoRA' in jobs else 'train'
        more = dict(base='teacher', device='cpu', rank=4) if how['to'] == 'lora' else {}
        if how['to'] != 'fp16': more['out'] = f'{i}.safetensors' if how['to'] == 'single-file' else f'{i}'
        try:
            with contextlib.redirect_stdout(io.StringIO()): export_to(Export(mode, **how, **more))
            cells[column] = dict(yes=True)
        except InputError as e: cells[column] = dict(no=str(e))
    return cells


def prepare(home: Path, make):
    "A teacher, real pictures, and prompts unless the teacher brings them"
    home.mkdir()
    make(home/'teacher')
    prompts = 'a red cat', 'the blue dog', 'an apple', 'the green shoe'
    if not brings_prompts(home/'teacher'): (home/'p.txt').write_text('\n'.join(prompts))
    (home/'real').mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(home/f'real/{i}.png')


def write(rows: dict):
    known = json.loads(FILE.read_text())['rows'] if FILE.is_file() else {}
    rows = {k: (known | rows)[k] for k in FAMILIES if k in known | rows}
    versions = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__,
                    machine=f'{platform.system()} {platform.machine()}')
    FILE.write_text(json.dumps(dict(**versions, close=CLOSE, rows=rows), indent=1) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('family', nargs='*')
    parser.add_argument('--rank-of', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    if args.rank_of: return as_rank(args.rank_of, args.family)
    names, done = args.family or list(FAMILIES), {}
    with tempfile.TemporaryDirectory() as tmp:
        for name in names: prepare(Path(tmp, name), FAMILIES[name])
        two = start_two(Path(tmp), names)
        for name in names:
            with contextlib.chdir(Path(tmp, name)):
                cells, found, jobs = alone(Path())
                done[name] = cells, exported(Path(), jobs), found
        rows = {}
        for name, (cells, exports, found) in done.items():
            rows[name] = cells | together(Path(tmp, name), cells, found, two) | exports | dict(date=f'{date.today()}')
            print(name, json.dumps(rows[name]), flush=True)
            write(rows)
        two.wait()


if __name__ == '__main__':
    main()
