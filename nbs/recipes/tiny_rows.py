"""What scores of the bundled world are compared with: real pictures, and the rows of the bundled teacher.

    python nbs/recipes/tiny_rows.py --work DIR

Makes the world's pictures as `embedded_teacher.py` does, takes the statistics of 24 passes over the trained captions and of
64 over the held-out ones (real-*.safetensors), then scores other passes: real pictures (the floor), the teacher with 25
steps at two guidance scales, and its single step without training. All of it goes to the bundled folder, with the sha256
of what it depends on. The features of each pass are kept in DIR, so that a stopped run goes on where it was.
"""
import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Callable
import embedded_teacher as recipe
import torch, tyro
from embedded_run import machine
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from sid_lsg_nb.core import EMBEDDED, atomic_write
from sid_lsg_nb.metrics.frechet import kernel_embedding, own_kernel_mean
from sid_lsg_nb.metrics.stored_rows import REAL, by_one_step, by_teacher, row_hashes
from sid_lsg_nb.metrics.tiny import CAPTIONS, TinyClip, draw_passes, load_captions, score_passes
from sid_lsg_nb.teachers.stable_diffusion import load_sd
from sid_lsg_nb.training.drawing import many_step_draw, student_draw

REFERENCE_PASSES = {'trained': 24, 'held-out': 64}
REFERENCE_SEED, FLOOR_SEED = 10_000, 20_000     # of the first pass of real pictures; the next have one more


@dataclass
class Row:
    "A row to draw"
    file: str       # of its passes
    name: str       # in the table
    how: dict
    draw: Callable  # (prompts, seeds) -> pictures


def rows() -> list[Row]:
    "The rows that are stored, but for real pictures"
    teacher = load_sd()
    t = teacher.default_t_init
    return [
        Row('undistilled', 'undistilled, one step', by_one_step(t), student_draw(teacher, teacher.denoiser, t)),
        *(Row(f'teacher-{k:g}', f'teacher, 25 steps, CFG {k:g}', by_teacher(25, k), many_step_draw(teacher, k, 25))
          for k in (1.5, 1.0))]


def kept(file: Path, make) -> torch.Tensor:
    "Features of one pass, from the file if it is there"
    if not file.exists():
        atomic_write(file, save(dict(features=make().contiguous())))
    return load_file(file)['features']


def real_pass(world: recipe.World, scorer: TinyClip, captions: str, seed: int) -> torch.Tensor:
    "Features of one fresh real picture per caption"
    g, combos = torch.Generator().manual_seed(seed), world.train if captions == 'trained' else world.held
    x = torch.cat([world.render(t, g) for t in combos.split(256)])
    return scorer.encode_images(recipe.bytes_round(x))


def write_reference(work: Path, out: Path, world, scorer, captions: str):
    "Statistics of many passes of real pictures"
    n = REFERENCE_PASSES[captions]
    make = lambda p: lambda: real_pass(world, scorer, captions, REFERENCE_SEED + p)
    f = torch.stack([kept(work / f'reference-{captions}-{p:02}.safetensors', make(p)) for p in range(n)]).double()
    e, flat = torch.stack([kernel_embedding(p) for p in f]), f.flatten(0, 1)
    own = torch.tensor(own_kernel_mean(e), dtype=torch.float64)
    stats = dict(mu=flat.mean(0), sigma=flat.T.cov().contiguous(), kernel_mean=e.mean(0).float(), kernel_own=own)
    atomic_write(out / f'real-{captions}.safetensors', save(stats))


def scored(name: str, how: dict, captions: str, features: torch.Tensor, scorer) -> tuple[dict, torch.Tensor]:
    "A row of the file for every number of passes, and the influences of its pictures"
    real = load_captions(captions)
    each = [score_passes(name, features[:k], real, scorer) for k in range(1, len(features) + 1)]
    row = dict(how=how, captions=captions, seed=0, scores=[asdict(s.score) for s in each])
    return row, each[-1].influence.half()


def main(
    work: Path,                 # where passes are kept, and the world's pictures
    out: Path = EMBEDDED,       # the bundled folder
    passes: int = 8,            # of each row
    threads: int = 1,           # of the processor
):
    "Draw what is missing, score, write"
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / 'glyphs.safetensors').exists():
        recipe.stage_data(work, out, 0)
    world, scorer, found, influence = recipe.World(work), TinyClip(), [], {}
    for captions in CAPTIONS:
        write_reference(work, out, world, scorer, captions)
    todo = [(c, p) for p in range(passes) for c in CAPTIONS]
    table = rows()
    for c, p in tqdm(todo, desc='passes'):
        kept(work / f'floor-{c}-{p:02}.safetensors', lambda: real_pass(world, scorer, c, FLOOR_SEED + p))
        m = len(CAPTIONS[c]())
        for row in table:
            draw = lambda: draw_passes(row.draw, scorer, CAPTIONS[c](), 1, p * m, batch=128)[0][0]
            kept(work / f'{row.file}-{c}-{p:02}.safetensors', draw)
    for c in CAPTIONS:
        for file, name, how in [('floor', 'real pictures', REAL), *((r.file, r.name, r.how) for r in table)]:
            f = torch.stack([load_file(work / f'{file}-{c}-{p:02}.safetensors')['features'] for p in range(passes)])
            row, influence[str(len(found))] = scored(name, how, c, f, scorer)
            found.append(row)
    atomic_write(out / 'rows.safetensors', save(influence))
    about = dict(machine=machine(), date=date.today().isoformat(), reference_passes=REFERENCE_PASSES)
    atomic_write(out / 'rows.json', json.dumps(about | dict(sha256=row_hashes(out), rows=found), indent=1) + '\n')


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
