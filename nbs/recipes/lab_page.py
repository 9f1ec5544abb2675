"""The lab's pages of the bundled teacher: ten methods beside each other, what settings do to diversity, and a remedy.

    python nbs/recipes/lab_page.py --work DIR
    python nbs/recipes/lab_page.py --work DIR --page-only

`sid-lsg lab` with the words below. DIR holds the world of `embedded_teacher.py data`, and gets the runs. Started several times
at once, processes share them; started again, it goes on. With `--page-only` the pages are made of what is finished.
Writes nbs/images/lab_methods.{json,html}, lab_settings.{json,html} and lab_remedy.{json,html}, and in path_ends.json how far
from real pictures the teacher's own paths end, by where they begin.
"""
import json, os
from datetime import date
from pathlib import Path
import embedded_teacher as recipe
import torch, tyro
from embedded_run import IMAGES, machine
from real_pictures import real_pictures, write_pictures
from sid_lsg_nb.commands.lab import lab
from sid_lsg_nb.commands.options import Lab
from sid_lsg_nb.core import atomic_write, noise_for
from sid_lsg_nb.method.rollout import step_times
from sid_lsg_nb.method.trajectories import path_end
from sid_lsg_nb.metrics.tiny import TinyClip, load_captions, tiny_score
from sid_lsg_nb.teachers.registry import open_teacher

REAL = '--real-images real-1000'
METHODS = ('sid', 'kd', f'dmd2 {REAL}', 'sim', 'fisher', 'di', f'f_distill {REAL}',
           'decoupled_dmd --guidance long --kappa 1.5', 'lcm', 'scm')
SETTINGS = ('sid', 'sid --kappa 1', 'sid --kappa 2', 'sid --kappa 1.6 --guidance-t-max 200', 'sid --alpha 1.2',
            'sid --student-steps 2')
REMEDY = 'sid --kappa 1.6 --guidance-t-max 200', 'sid --kappa 1'
PAGES = {  # name: rows, options, folder of the runs in DIR
    'lab_methods': (METHODS, '--max-train-images 4800 --sample-every 0', 'runs/lab'),
    'lab_settings': (SETTINGS, '--max-train-images 2400 --sample-every 0', 'runs/effects'),
    'lab_remedy': (
        REMEDY, '--init shipped --max-train-images 2400 --sample-every 0 --lr 1e-4 --lr-fake 1e-4', 'runs/remedy')}


def path_ends(
    starts: tuple = (625, 999),                                   # the first time, where there is start noise alone
    steps: int = 8,
    kappa: float = 1.25,
) -> list[dict]:
    "The distance of the ends of the teacher's paths, a picture for each bundled caption"
    teacher, scorer, captions = open_teacher(), TinyClip(), load_captions()

    def drawing(t_init):
        times = step_times(t_init, steps)

        def draw(prompts, seeds):
            z, null = noise_for(seeds, teacher.latent_shape), teacher.text.null()
            return teacher.decode(path_end(teacher.denoiser, z, teacher.text(prompts), null, times, kappa))

        return draw

    scores = [tiny_score(f'from {t}', drawing(t), scorer, captions, 1) for t in starts]
    return [dict(t_init=t, steps=steps, kappa=kappa, tiny_fd=s.tiny_fd, n=len(captions.captions))
            for t, s in zip(starts, scores)]


def main(
    work: Path,                                                   # the world of the bundled teacher, and the runs
    page_only: tyro.conf.FlagCreatePairsOff[bool] = False,        # train nothing
    out: Path = IMAGES,
):
    "All pages"
    torch.set_num_threads(1)
    out = out.resolve()
    if not (work/'real-1000').exists(): write_pictures(work/'real-1000', real_pictures(recipe.World(work), 1_000))
    os.chdir(work)  # the words of a row are then the same everywhere
    for name, (rows, options, folder) in PAGES.items():
        page = lab(Lab(rows, seeds=3, options=options, out=folder, device='cpu', page_only=page_only))
        kept = json.loads(page.with_name('lab.json').read_text()) | dict(machine=machine(), date=f'{date.today()}')
        atomic_write(out/f'{name}.json', json.dumps(kept, indent=1) + '\n')
        atomic_write(out/f'{name}.html', page.read_text(encoding='utf-8'))
    atomic_write(out/'path_ends.json', json.dumps(path_ends(), indent=1) + '\n')


if __name__ == '__main__': tyro.cli(main, description=__doc__)
