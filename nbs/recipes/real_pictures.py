"""Real pictures or synthetic ones? A distilled student goes on: alone, or with an adversary on pictures of either kind.

    python nbs/recipes/real_pictures.py --work DIR --run RUN

Each row goes on from RUN, a finished `sid-lsg distill --preset embedded-long`, generator and fake as it left them, with SiD
alone or with the adversary of SiDA beside it on 100, 1,000 or 10,000 real pictures, or on 1,000 drawn by the teacher (25
steps, CFG 1.5). Runs of one seed are paired: noise, times and captions are the same. DIR holds the world of
`embedded_teacher.py data`, gets the pictures, and keeps the features of the scored ones. Rows are written after each run;
started again, or several times at once, it goes on with what nobody has begun.
"""
import json
from dataclasses import asdict
from pathlib import Path
import embedded_teacher as recipe
import torch, tyro
from embedded_run import IMAGES
from recipe_search import go_on
from safetensors.torch import save
from torchvision.utils import save_image
from sid_lsg_nb.core import atomic_write
from sid_lsg_nb.metrics.tiny import TinyClip, draw_passes, load_captions, score_passes
from sid_lsg_nb.teachers.stable_diffusion import load_sd
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.drawing import many_step_draw, student_draw
from sid_lsg_nb.training.job import iterate, setup

SIZES = 100, 1_000, 10_000
SYNTHETIC = 1_000
SEED = 500                                      # of the first run; the next have one more
PASSES = 4                                      # over the trained captions, for a score
BASE = dict(kappa=1.25, t_max=400, t_init=450, lr=1e-4, lr_fake=1e-4, lr_scheduler='linear', ema_halflife=2_000, device='cpu')
ARMS = {
    'SiD alone': {},
    **{f'{n:,} real': dict(real_images=f'real-{n}') for n in SIZES},
    f"{SYNTHETIC:,} of the teacher's": dict(real_images='teacher'),
    f'{SIZES[-1]:,} real, a stronger push': dict(real_images=f'real-{SIZES[-1]}', gan_weight_generator=1e-2)}


def write_pictures(folder: Path, x: torch.Tensor, first: int):
    "As PNG, one file each"
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(x, first): save_image((picture + 1)/2, folder/f'{i:05}.png')


def real_pictures(world: recipe.World, work: Path):
    "The same first pictures in every folder"
    g = torch.Generator().manual_seed(SEED - 1)
    for i in range(0, SIZES[-1], 100):
        x = world.render(world.pick(100, g), g)
        for n in SIZES:
            if i < n: write_pictures(work/f'real-{n}', x, i)


def teachers_pictures(world: recipe.World, work: Path):
    "Of random captions as well"
    draw, g = many_step_draw(load_sd(), 1.5, 25), torch.Generator().manual_seed(SEED - 2)
    for i in range(0, SYNTHETIC, 100):
        captions = [world.caption(t) for t in world.pick(100, g)]
        done = work/'teacher'/f'{i + 99:05}.png'
        if done.exists(): continue
        with torch.no_grad(): x = draw(captions, [1_000_000 + i + j for j in range(100)])
        write_pictures(work/'teacher', x.clamp(-1, 1), i)


def go_on_and_score(options: dict, seed: int, images: int, run: Path, file: Path) -> dict:
    "One run, its last losses, and what its average scores; features go to the file"
    job, logs = setup(Config(**BASE | options, seed=seed, max_train_images=images)), []
    go_on(job, run)
    for s in iterate(job):
        logs.append({k: float(v) for k, v in s.logs.items() if v is not None and torch.as_tensor(v).numel() == 1})
        if s.nimg >= images: break
    draw, scorer, real = student_draw(job.teacher, job.ema.net, job.t_init, 1), TinyClip(), load_captions()
    with torch.no_grad(): features, _ = draw_passes(draw, scorer, real.captions, PASSES)
    atomic_write(file, save(dict(features=features.contiguous())))
    score = asdict(score_passes('', features, real, scorer).score)
    late = logs[len(logs)*3//4:]
    mean = {k: round(sum(l[k] for l in late)/len(late), 4) for k in late[0]}
    return dict(first=[round(l['loss'], 5) for l in logs[:3]], logs=mean, score=score)


def main(
    work: Path,                                 # the world of the bundled teacher; pictures and features
    run: Path,                                  # to go on from
    seeds: int = 3,                             # runs of each kind
    arms: tuple[str, ...] = tuple(ARMS),        # which kinds
    images: int = 4_800,                        # of one run
    out: Path = IMAGES/'real_pictures.jsonl',   # a line per run; runs that are there are not run again
):
    "Make the pictures, go on, score"
    torch.set_num_threads(1)
    world, begun = recipe.World(work), Path(f'{out}.begun')
    begun.mkdir(exist_ok=True)
    if not (work/f'real-{SIZES[-1]}').exists(): real_pictures(world, work)
    for seed in range(SEED, SEED + seeds):
        for i, name in enumerate(arms):
            if 'teacher' in name: teachers_pictures(world, work)
            try: (begun/f'{i}-{seed}').mkdir()
            except FileExistsError: continue
            options = dict(ARMS[name])
            if 'real_images' in options: options['real_images'] = str(work/options['real_images'])
            found = go_on_and_score(options, seed, images, run, work/f'features-{i}-{seed}.safetensors')
            row = dict(name=name, seed=seed, images=images, settings=BASE | ARMS[name]) | found
            with open(out, 'a') as f: f.write(json.dumps(row) + '\n')
            print(row, flush=True)


if __name__ == '__main__': tyro.cli(main, description=__doc__)
