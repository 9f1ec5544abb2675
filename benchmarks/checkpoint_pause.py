"""How long a run waits for a checkpoint: written at once, and while the run goes on (`--async-checkpoint`).

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/checkpoint_pause.py --millions 100 400
    MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 benchmarks/checkpoint_pause.py --millions 100 400

(That setting makes the C library give back at once what is freed; else the copy takes room that was kept for later.)

Random SD3 transformers; CPU, fp32; several processes have them in slices. Seconds of the first process: an iteration,
the pause for a checkpoint of either kind, an iteration while the file is being written, and how long that takes. MiB:
what the copy adds to the process, and what the dry run counts for it. Linux only (it reads /proc). Rows go to
checkpoint_pause.json, in the place of older ones of their kind, and from there into README.md."""

import argparse, json, re, tempfile, time
from datetime import date
from pathlib import Path
from statistics import median
import torch
from sharded_memory import SIZES, forget_peak, memory, write_teacher
from sid_lsg_nb.teachers.registry import model_shapes
from sid_lsg_nb.testing import quiet_libraries
from sid_lsg_nb.training.config import Config, resolve
from sid_lsg_nb.training.distributed import Distributed
from sid_lsg_nb.training.job import iterate
from sid_lsg_nb.training.memory import MemorySettings, copy_bytes
from sid_lsg_nb.training.resume import CheckpointWriter, open_run

HERE, MIB = Path(__file__).parent, 2**20


def seconds(work) -> float:
    "How long it takes"
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(folder: Path, processes: Distributed) -> dict:
    "One run, two checkpoints of each kind"
    (folder/'p.txt').write_text('a red cat\na blue dog\n')
    config = Config(
        teacher=str(folder), prompts=str(folder/'p.txt'), device='cpu', total_batch_size=2, max_train_images=99,
        fsdp=processes.world > 1, out=str(folder/'run'), async_checkpoint=True)
    job, run = open_run(config, processes)
    steps, told = iterate(job), dict(alone=[], at_once=[], copied=[], beside=[], written=[], room=[])

    def step() -> float:
        return seconds(lambda: setattr(job, 'nimg', next(steps).nimg))

    step()  # the first one has Adam's moments to make
    for _ in range(2):
        told['alone'] += [step(), step()]
        waits = CheckpointWriter(job, run)
        waits.in_background = False
        told['at_once'].append(seconds(waits.save))
        step()
        forget_peak()
        held, writer = memory('VmRSS'), CheckpointWriter(job, run)
        start = time.perf_counter()
        told['copied'].append(seconds(writer.save))
        told['room'].append((memory('VmHWM') - held)/MIB)
        while processes.any_rank(writer.thread.is_alive()): told['beside'].append(step())
        writer.wait()
        told['written'].append(time.perf_counter() - start)
    shapes = model_shapes(str(folder))
    counted = copy_bytes(shapes, MemorySettings.of(resolve(config, processes.world), guided=True, world=processes.world))
    found = {k: round(median(v), 2) for k, v in told.items()} | dict(counted=round(counted/MIB), beside_n=len(told['beside']))
    return found | dict(weights=round(sum(p.numel() for p in job.teacher.denoiser.parameters())/1e6))


HEAD = """## How long a run waits for a checkpoint

Made by `benchmarks/checkpoint_pause.py`, whose first lines say what is measured, on two CPU cores, for which the thread that
writes competes with the iterations. Beside a GPU it was not measured. Medians of two checkpoints.

| million weights | processes | iteration, s | pause, written at once, s | pause with `--async-checkpoint`, s | shorter by | iteration meanwhile, s | until it is written, s | copy, MiB | counted, MiB | torch, date |
|---|---|---|---|---|---|---|---|---|---|---|"""


def line(r: dict) -> str:
    "A row of the table"
    pause = f'{r["at_once"]:.2f} | {r["copied"]:.2f} | **{r["at_once"]/r["copied"]:.1f} x**'
    then = f'{r["beside"]:.2f} ({r["beside_n"]}) | {r["written"]:.1f} | {r["room"]:,.0f} | {r["counted"]:,}'
    return f'| {r["weights"]} | {r["world"]} | {r["alone"]:.2f} | {pause} | {then} | {r["torch"]}, {r["date"]} |'


def write(new: list[dict], here: Path = HERE):
    "Put rows into the file and the table, in the place of older ones of their kind"
    file, readme, key = here/'checkpoint_pause.json', here/'README.md', lambda r: (r['weights'], r['world'])
    old = json.loads(file.read_text()) if file.exists() else []
    rows = sorted({key(r): r for r in old + new}.values(), key=key)
    file.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    part = '\n'.join(['<!-- pause -->', HEAD, *map(line, rows), '<!-- /pause -->'])
    text, n = re.subn('<!-- pause -->.*<!-- /pause -->', lambda _: part, readme.read_text(encoding='utf-8'), flags=re.S)
    readme.write_text(text if n else f'{text.rstrip()}\n\n{part}\n', encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--millions', type=int, nargs='+', default=[100, 400], choices=SIZES)
    args = parser.parse_args()
    quiet_libraries()
    processes, rows = Distributed('cpu'), []
    for n in args.millions:
        with tempfile.TemporaryDirectory() as tmp:
            place = Path(processes.broadcast(tmp))/str(n)
            processes.run_on_main(lambda: write_teacher(place, *SIZES[n]))
            more = dict(world=processes.world, torch=torch.__version__.split('+')[0], date=str(date.today()))
            rows.append(measure(place, processes) | more)
            processes.barrier()
    if processes.is_main:
        write(rows)
        print('\n'.join(map(line, rows)))
    processes.close()


if __name__ == '__main__':
    main()
