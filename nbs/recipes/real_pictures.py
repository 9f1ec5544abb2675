"""Real pictures, or the teacher's? SiD goes on from a finished student, with and without a discriminator.

    python nbs/recipes/real_pictures.py --work DIR
    python nbs/recipes/real_pictures.py --work DIR --table-only

Every run begins as the student that comes with the package (`--init shipped`). Some go on without pictures; the others compare
with 100, 1,000 or 10,000 real pictures of the world, or with 1,000 that the teacher drew. Runs of one seed see the same noise,
times and order of captions, and are scored on the same noise, so that their differences are paired. DIR holds the world of
`embedded_teacher.py data`. Finished runs are kept in DIR; started again, or several times at once, it goes on with those that
nobody has begun. With `--table-only`, what is there is written to nbs/images/real_pictures.json.
"""
import itertools, json
from dataclasses import asdict
from pathlib import Path
import embedded_teacher as recipe
import torch, tyro
from PIL import Image
from safetensors.torch import load_file, save_file
from embedded_run import IMAGES, machine
from sid_lsg_nb.core import EMBEDDED, atomic_write
from sid_lsg_nb.data.prompt_stream import read_prompts
from sid_lsg_nb.metrics.tiny import TinyClip, draw_passes, load_captions, score_passes
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.drawing import many_step_draw, student_draw
from sid_lsg_nb.training.job import iterate, setup

SEEDS = 0, 1, 2
BASE = 'no pictures'
ARMS = {                                        # options beside those of all; `pictures` is a folder of DIR
    BASE: dict(),
    'no pictures, at once': dict(freeze_generator_until=0),
    '1,000 real': dict(pictures='real-1000'),
    "1,000 of the teacher's": dict(pictures='teacher-1000'),
    '1,000 real, weight x 100': dict(pictures='real-1000', gan_weight_generator=1e-2),
    '100 real': dict(pictures='real-100'),
    '10,000 real': dict(pictures='real-10000'),
    '1,000 real, weight x 10': dict(pictures='real-1000', gan_weight_generator=1e-3),
    "1,000 of the teacher's, weight x 10": dict(pictures='teacher-1000', gan_weight_generator=1e-3),
    "1,000 of the teacher's, weight x 100": dict(pictures='teacher-1000', gan_weight_generator=1e-2),
    'as it began': None}
OPTIONS = dict(init='shipped', kappa=1.6, guidance_t_max=200, lr=1e-4, lr_fake=1e-4, device='cpu')
PASSES = {'trained': 2, 'held-out': 4}          # over the captions, for a score
KEPT = 'tiny_fd', 'tiny_fd_se', 'tiny_clip', 'concept', 'style', 'color', 'n'


def write_pictures(folder: Path, pictures):      # batches [B,3,32,32] in [-1,1]
    "PNG files, all or none"
    part = folder.with_name(folder.name + '.part')
    part.mkdir(exist_ok=True)
    for i, x in enumerate(itertools.chain.from_iterable(pictures)):
        rgb = ((x.clamp(-1, 1) + 1)*127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(rgb).save(part/f'{i:05d}.png')
    part.rename(folder)


def real_pictures(world: recipe.World, n: int):
    "Of the captions that the teacher was trained on, at random"
    g = torch.Generator().manual_seed(77)
    for k in range(0, n, 100):
        yield world.render(world.train[torch.randint(len(world.train), (min(100, n - k),), generator=g)], g)


def teacher_pictures(n: int):
    "Of captions of the same list, with the teacher's best guidance"
    captions, g = read_prompts(EMBEDDED/'prompts.txt'), torch.Generator().manual_seed(78)
    draw = many_step_draw(open_teacher('embedded'), 1.5, 25)
    for k in range(0, n, 100):
        some = torch.randint(len(captions), (min(100, n - k),), generator=g).tolist()
        yield draw([captions[i] for i in some], [10_000_000 + k + i for i in range(len(some))])


def run(arm: str, seed: int, images: int, work: Path):
    "Train and draw; features and first losses are kept"
    options = dict(OPTIONS, **ARMS[arm] or {})
    if folder := options.pop('pictures', ''): options['real_images'] = str(work/folder)
    job, first = setup(Config(seed=seed, max_train_images=images, **options)), []
    for s in iterate(job) if ARMS[arm] is not None else ():
        if len(first) < 3: first.append([round(float(s.logs[k]), 5) for k in ('loss_fake', 'loss')])
        if s.nimg >= images: break
    draw, scorer = student_draw(job.teacher, job.ema.net, job.t_init, 1), TinyClip()
    with torch.no_grad():
        found = {which: draw_passes(draw, scorer, load_captions(which).captions, n, seed=100_000*seed)[0]
                 for which, n in PASSES.items()}
    save_file(found, work/'runs'/f'{name_of(arm, seed)}.safetensors', dict(first=json.dumps(first)))


def name_of(arm: str, seed: int) -> str:
    return f'{list(ARMS).index(arm)}-{seed}'


def table(work: Path, images: int) -> dict:
    "The scores of all finished runs, with their differences from the run of the same seed without pictures"
    scorer, captions, rows = TinyClip(), {which: load_captions(which) for which in PASSES}, []
    for seed in SEEDS:
        scored = {}
        for arm in ARMS:
            file = work/'runs'/f'{name_of(arm, seed)}.safetensors'
            if not file.exists(): continue
            features = load_file(file)
            scored[arm] = {which: score_passes(arm, features[which], captions[which], scorer) for which in PASSES}
            told = {which: {k: asdict(s.score)[k] for k in KEPT} for which, s in scored[arm].items()}
            for which, s in scored[arm].items():
                if arm == BASE or BASE not in scored: continue
                apart = s.minus(scored[BASE][which])
                told[which] |= dict(difference=apart.fd_difference, difference_se=apart.fd_difference_se)
            rows.append(dict(arm=arm, seed=seed, images=images, scores=told))
    return dict(machine=machine(), options=OPTIONS, arms=ARMS, rows=rows)


def main(
    work: Path,                                 # the world of the bundled teacher, pictures and runs
    images: int = 2_400,                        # of one run
    table_only: tyro.conf.FlagCreatePairsOff[bool] = False, # of the runs that are finished
    out: Path = IMAGES/'real_pictures.json',
):
    "Run what is missing, then write the table"
    torch.set_num_threads(1)
    (work/'runs').mkdir(exist_ok=True)
    world = recipe.World(work)
    for n in (100, 1_000, 10_000):
        if not (work/f'real-{n}').exists(): write_pictures(work/f'real-{n}', real_pictures(world, n))
    if not (work/'teacher-1000').exists(): write_pictures(work/'teacher-1000', teacher_pictures(1_000))
    for seed, arm in [] if table_only else itertools.product(SEEDS, ARMS):
        try: (work/'runs'/name_of(arm, seed)).mkdir()
        except FileExistsError: continue
        run(arm, seed, images, work)
        print(arm, seed, flush=True)
    atomic_write(out, json.dumps(table(work, images)) + '\n')


if __name__ == '__main__': tyro.cli(main, description=__doc__)
