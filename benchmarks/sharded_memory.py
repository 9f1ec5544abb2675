"""Memory of two processes in slices: what each holds after the set-up, at the worst moment on the way there, and in an
iteration, beside what the dry run counts.

    MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 benchmarks/sharded_memory.py --millions 100 400

(That setting makes the C library give back at once what is freed; else what it keeps for later is counted, too.)

Random SD3 transformers; gloo, CPU, fp32. `in files`: each process reads its slices out of the files, as `--fsdp` does.
`whole` (`--whole`): the teacher is opened whole and given to `setup`, for comparison. Linux only (it reads /proc).
Rows go to sharded_memory.json, in the place of older ones of their kind, and from there into README.md."""

import argparse, gc, json, re, tempfile
from datetime import date
from pathlib import Path
import torch
from diffusers import SD3Transformer2DModel
from torch.distributed.tensor import DTensor
from sid_lsg_nb.teachers.registry import model_shapes, open_teacher
from sid_lsg_nb.testing import quiet_libraries, tiny_sd3
from sid_lsg_nb.training.checkpoint import checkpoints
from sid_lsg_nb.training.config import Config, resolve
from sid_lsg_nb.training.distributed import Distributed
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.memory import MemorySettings, checkpoint_bytes, memory_budget
from sid_lsg_nb.training.resume import save

HERE = Path(__file__).parent
MIB = 2**20
SIZES = {100: (512, 10), 400: (1024, 10)}  # millions of weights: width, blocks


def memory(word: str) -> int:  # VmRSS: now; VmHWM: the most since `forget_peak`
    "Bytes of this process's memory, as Linux counts them"
    return int(re.search(rf'{word}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])*1024


def forget_peak():
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')


def write_teacher(folder: Path, width: int, blocks: int):
    "A tiny pipeline around a transformer of this size"
    tiny_sd3(folder)
    config = SD3Transformer2DModel.load_config(folder/'transformer')
    more = dict(num_layers=blocks, attention_head_dim=64, num_attention_heads=width//64, caption_projection_dim=width)
    SD3Transformer2DModel.from_config(config, **more).save_pretrained(folder/'transformer')


def nbytes(t: torch.Tensor) -> int:
    t = t.to_local() if isinstance(t, DTensor) else t
    return t.numel()*t.element_size()


def measure(folder: Path, processes: Distributed, whole: bool) -> dict:  # MiB
    "One set-up"
    (folder/'p.txt').write_text('a red cat\na blue dog\n')
    config = Config(
        teacher=str(folder), prompts=str(folder/'p.txt'), device='cpu', total_batch_size=4, micro_batch=1, max_train_images=8, fsdp=True)
    forget_peak()
    before = memory('VmRSS')
    job = setup(config, processes, open_teacher(folder) if whole else None)
    now, peak = memory('VmRSS'), memory('VmHWM')
    nets = [job.teacher.denoiser, job.ema.net, *(l.net for l in job.nets.learners.values())]
    moments = [v for l in job.nets.learners.values() for s in l.optimizer.state.values() for v in s.values()]
    slices = sum(nbytes(p) for n in nets for p in n.parameters()) + sum(map(nbytes, moments))
    net = job.teacher.denoiser.net
    block = sum(p.numel() for p in net.transformer_blocks[0].parameters())*4
    count = sum(p.numel() for p in net.parameters())
    held = dict(slices=slices, held=now - before, peak=peak - before, block=block)
    del net, nets, moments
    told = dict(weights=round(count/1e6), **{k: round(v/MIB) for k, v in held.items()}, ratio=round((peak - before)/slices, 2))
    return told | trained(job, config, processes, before)


def trained(job, config: Config, processes: Distributed, before: int) -> dict:  # MiB
    "The worst moment of two iterations, and a checkpoint, beside what is counted from shapes"
    shapes, folder = model_shapes(config.teacher), Path(config.teacher)
    settings = MemorySettings.of(resolve(config, processes.world), guided=True, world=processes.world)
    forget_peak()
    for _ in zip(range(2), iterate(job)): pass
    peak = memory('VmHWM') - before
    save(job, folder/'run')
    counted = dict(counted=sum(memory_budget(shapes, settings).values()), counted_file=checkpoint_bytes(shapes, settings))
    file = sum(f.stat().st_size for f in checkpoints(folder/'run/checkpoints')[0].iterdir())
    return {k: round(v/MIB) for k, v in (counted | dict(trained=peak, file=file)).items()}


HEAD = """## Memory of two processes in slices

Made by `MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 benchmarks/sharded_memory.py`, and by the same line with "--whole" at its end; its first lines say what is compared.
MiB per process, without what the libraries take. "Slices": this process's weights of the teacher, generator, fake and average, and Adam's
numbers (none before the first step). "Peak / slices" is the worst moment of the set-up; pages of files that were read may be counted.
"Two iterations", of two micro-batches each, is the worst moment of training (with one micro-batch 0.84 of the count, which adds the gradient to the activations), and "dry run" what `--dry-run` counts for it; then a checkpoint's files and their count.

| teacher, million weights | network opened | process | slices | held after set-up | peak | peak / slices | one block | two iterations | dry run | measured / counted | checkpoint | dry run | torch, date |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def line(r: dict) -> str:
    "A row of the table"
    place = f'{r["weights"]} | {r["way"]} | {r["rank"]} | {r["slices"]:,}'
    ratio = f'**{r["trained"]/r["counted"]:.2f}**' if 'trained' in r else ''
    trained, counted, file, counted_file = (f'{r[k]:,}' if k in r else '' for k in ('trained', 'counted', 'file', 'counted_file'))
    training = f'{trained} | {counted} | {ratio} | {file} | {counted_file}'
    return f'| {place} | {r["held"]:,} | {r["peak"]:,} | **{r["ratio"]:.2f}** | {r["block"]} | {training} | {r["torch"]}, {r["date"]} |'


def write(new: list[dict], here: Path = HERE):
    "Put rows into the file and the table, in the place of older ones of their kind"
    file, readme, key = here/'sharded_memory.json', here/'README.md', lambda r: (r['weights'], r['way'], r['rank'])
    old = json.loads(file.read_text()) if file.exists() else []
    rows = sorted({key(r): r for r in old + new}.values(), key=key)
    file.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    part = '\n'.join(['<!-- slices -->', HEAD, *map(line, rows), '<!-- /slices -->'])
    text, n = re.subn('<!-- slices -->.*<!-- /slices -->', lambda _: part, readme.read_text(encoding='utf-8'), flags=re.S)
    readme.write_text(text if n else f'{text.rstrip()}\n\n{part}\n', encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--millions', type=int, nargs='+', default=[100, 400], choices=SIZES)
    parser.add_argument('--whole', action='store_true', help='open the teacher whole, for comparison')
    args = parser.parse_args()
    quiet_libraries()
    processes, rows = Distributed('cpu'), []
    with tempfile.TemporaryDirectory() as tmp:
        place = Path(processes.broadcast(tmp))
        for n in args.millions:
            processes.run_on_main(lambda: write_teacher(place/str(n), *SIZES[n]))
            found = processes.all_gather(measure(place/str(n), processes, args.whole))
            more = dict(way='whole' if args.whole else 'in files', torch=torch.__version__.split('+')[0], date=str(date.today()))
            rows += [dict(rank=rank, **f, **more) for rank, f in enumerate(found)]
            processes.barrier()
    if processes.is_main:
        write(rows)
        print('\n'.join(map(line, rows)))
    processes.close()


if __name__ == '__main__':
    main()
