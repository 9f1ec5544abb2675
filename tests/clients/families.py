"""Students of every family that stable-diffusion.cpp knows, with random weights, opened and drawn by it.

Which tensors of what we hand out does the program take, which does it not know, which does it miss, and is the picture
the one that is drawn here?

    python tests/clients/families.py FOLDER [FAMILY ...] [--python PYTHON]

Not part of CI: like its neighbour `stable_diffusion_cpp.py` it builds the program in FOLDER/venv, unless
PYTHON is an interpreter that has it, and needs 10 GB of memory (Z-Image more than 20, and has not been
seen to end). The program reads shapes strictly:
networks have the width of the real models and as few blocks as it takes. Of the large layers of a kind the
first has random weights and the others zeros, which are holes in the file, so that even the largest model is
written in seconds. Rows go to FOLDER/families.json."""

import argparse, json, os, platform, re, shutil, subprocess, tempfile, time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers import ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3Model
from transformers import T5Config, T5EncoderModel
from sid_lsg_nb.export.formats import to_original_layout
from sid_lsg_nb.export.original_layouts import LAYOUTS
from sid_lsg_nb.method.rollout import one_step
from sid_lsg_nb.teachers.registry import FAMILIES as TEACHERS, known_single_file_models
from sid_lsg_nb.teachers.sdxl import CLIP_G, CLIP_L
from sid_lsg_nb.teachers.single_file import write_clip_vocabulary
from sid_lsg_nb.teachers.stable_diffusion import CLIP_PAD
from sid_lsg_nb.testing import tiny_sd3_t5
from stable_diffusion_cpp import VERSION, build

SIDE, SEED, PROMPT, T_INIT, LARGE = 64, 1, 'a photo of a red cat', 625, 2**20
DRAW = """
import json, sys
from stable_diffusion_cpp import StableDiffusion
opened, told, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
sd = StableDiffusion(**opened, rng_type='cpu', sampler_rng_type='cpu', verbose=True)
picture, = sd.generate_image(**told)
picture.save(out)
"""

# ---- networks

def untouched(like: torch.Tensor) -> torch.Tensor:
    "Zeros that take no memory until somebody writes there"
    return torch.from_numpy(np.zeros(like.shape, dict(float32=np.float32, float16=np.float16)[str(like.dtype)[6:]]))

def value(name: str, like: torch.Tensor, seen: set) -> torch.Tensor:
    "Random numbers that a layer's answers keep their size by; zeros where a large layer of the kind has been seen"
    kind = re.sub(r'\d+', '#', name), tuple(like.shape)
    if name.endswith('position_ids'): return torch.arange(like.shape[-1])[None]
    if like.numel() >= LARGE and kind in seen: return untouched(like)
    seen.add(kind)
    if like.dim() == 1 and not name.endswith(('bias', '_token')): return torch.ones(like.shape, dtype=like.dtype)
    scale = like[0].numel()**-.5 if like.dim() > 1 else .02
    return (torch.randn(like.shape)*scale).half().to(like.dtype)

def made(kind: type, config, dtype=torch.float32) -> nn.Module:
    "A network of diffusers or transformers with numbers that 16 bits can hold"
    with torch.device('meta'):
        net = (kind.from_config(config) if isinstance(config, dict) else kind(config)).to(dtype)
    seen = set()
    for where, module in net.named_modules():
        for k, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[k] = nn.Parameter(value(f'{where}.{k}', p, seen), requires_grad=False)
        for k, b in module._buffers.items():
            if b is not None: module._buffers[k] = value(f'{where}.{k}', b, seen)
    if hasattr(net, 'tie_weights'): net.tie_weights()
    return net.eval()

def clip(config: dict, kind: type = CLIPTextModel):
    return made(kind, CLIPTextConfig(**dict(
        vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407) | config))

def clip_words(pad: str = CLIP_PAD) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as tmp:
        write_clip_vocabulary(tmp)
        return CLIPTokenizer(f'{tmp}/vocab.json', f'{tmp}/merges.txt', pad_token=pad, model_max_length=77)

def wide_vae(scale: float, shift: float):
    "The VAE of Stable Diffusion 3, FLUX.1 and Z-Image"
    return made(AutoencoderKL, dict(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=[128, 256, 512, 512], layers_per_block=2,
        down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4, sample_size=1024,
        scaling_factor=scale, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False))

# ---- pipelines

def latent_diffusion(name: str) -> Callable:
    def make():
        "One of the models that have a file in the layout of the first Stable Diffusion"
        model = known_single_file_models()[name]
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)[:len(model.text)]
        text = [clip(c, kind) for c, kind in zip(model.text, kinds)]
        words = [clip_words(pad) for pad in model.pads]
        parts = dict(text_encoder=text[0], tokenizer=words[0])
        if len(text) == 2: parts |= dict(text_encoder_2=text[1], tokenizer_2=words[1])
        else: parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        unet = made(UNet2DConditionModel, dict(model.unet))
        vae = made(AutoencoderKL, {k: v for k, v in model.vae.items() if k[:1] != '_'})
        scheduler = DDIMScheduler(**dict(model.scheduler, prediction_type='epsilon'))
        return getattr(diffusers, model.layout.pipeline)(unet=unet, vae=vae, scheduler=scheduler, **parts)
    return make

def sd3():
    one = clip(CLIP_L | dict(projection_dim=768), CLIPTextModelWithProjection)
    nn.init.eye_(one.text_projection.weight)
    net = made(SD3Transformer2DModel, dict(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192))
    return diffusers.StableDiffusion3Pipeline(
        net, FlowMatchEulerDiscreteScheduler(shift=3.), wide_vae(1.5305, .0609), one, clip_words(),
        clip(CLIP_G, CLIPTextModelWithProjection), clip_words('!'), None, None)

def flux():
    t5 = made(T5EncoderModel, T5Config(
        vocab_size=32128, d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=1, is_gated_act=True,
        feed_forward_proj='gated-gelu', dense_act_fn='gelu_new'))
    net = made(FluxTransformer2DModel, dict(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56)))
    levels = FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True)
    return diffusers.FluxPipeline(
        levels, wide_vae(.3611, .1159), clip(CLIP_L), clip_words(), t5, tiny_sd3_t5()[0], net)

@dataclass
class Parts:
    "Networks of a pipeline that is not drawn here"
    transformer: nn.Module
    vae: nn.Module
    text_encoder: nn.Module

def qwen_image():
    rope = dict(rope_type='default', rope_theta=1e6, mrope_section=[16, 24, 24])
    text = dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=2048, rope_parameters=rope)
    words = Qwen2_5_VLConfig(text_config=text, vision_config=dict(hidden_size=1280), tie_word_embeddings=False)
    return Parts(
        made(QwenImageTransformer2DModel, dict(num_layers=1)), made(AutoencoderKLQwenImage, {}),
        made(Qwen2_5_VLForConditionalGeneration, words, torch.float16))

def z_image():
    words = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=2048)
    net = made(ZImageTransformer2DModel, dict(
        in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30, cap_feat_dim=2560,
        axes_dims=[32, 48, 48], axes_lens=[1024, 512, 512]), torch.float16)
    return Parts(net, wide_vae(.3611, .1159), made(Qwen3Model, words, torch.float16))

# ---- what is handed out

def write(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    "A safetensors file of 16 bits, with holes for zeros"
    header, at = {}, 0
    for k, v in tensors.items():
        header[k] = dict(dtype='F16', shape=list(v.shape), data_offsets=[at, at := at + 2*v.numel()])
    text = json.dumps(header).encode()
    text += b' '*(-len(text) % 8)
    with open(file, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        begin = f.tell()
        for k, v in tensors.items():
            f.seek(begin + header[k]['data_offsets'][0])
            if np.any(v.numpy()): f.write(v.half().contiguous().numpy().tobytes())
        f.truncate(begin + at)
    return file

def single_file(pipe, out: Path, kind: str = '') -> dict:
    "As `export --to single-file` names its tensors"
    kind = kind or type(pipe).__name__
    return dict(model_path=write(LAYOUTS.get(kind, to_original_layout)(pipe), out/'student.safetensors'))

def saved(net: nn.Module, out: Path) -> Path:
    "As a student's folder holds a network"
    net.save_pretrained(out)
    return next(out.glob('*.safetensors'))

def folder_parts(pipe: Parts, out: Path) -> dict:
    "The files of a student's folder"
    return dict(
        diffusion_model_path=write(pipe.transformer.state_dict(), out/'transformer.safetensors'),
        vae_path=saved(pipe.vae.half(), out/'vae'), llm_path=saved(pipe.text_encoder, out/'text_encoder'))

def folder_with_original_vae(pipe: Parts, out: Path) -> dict:
    "The same, the VAE by the names that were missed, as diffusers' own converter matches them"
    names = re.findall(r"tensor 'first_stage_model\.(.*?)' not in", (out/'drawn.txt').read_text())
    original = convert_wan_vae_to_diffusers({k: k for k in names})  # diffusers' name: the original
    vae = {original[k]: v for k, v in pipe.vae.state_dict().items()}
    return folder_parts(pipe, out) | dict(vae_path=write(vae, out/'vae.safetensors'))

def without_t5(pipe, out: Path) -> dict:
    tensors = {k: v for k, v in LAYOUTS['FluxPipeline'](pipe).items() if not k.startswith('text_encoders.t5xxl.')}
    return dict(model_path=write(tensors, out/'less.safetensors'))

def z_image_file(pipe: Parts, out: Path) -> dict:
    "One file, and the language model beside it by the names of its whole"
    words = {f'model.{k}': v for k, v in pipe.text_encoder.state_dict().items()}
    return single_file(pipe, out, 'ZImagePipeline') | dict(llm_path=write(words, out/'words.safetensors'))

@dataclass(frozen=True)
class Family:
    make: Callable  # -> a pipeline, or its parts
    tries: dict  # what is tried: (pipeline, folder) -> the files, by the program's names for them
    sigma: str = '1.0'  # where the one step begins
    tell: dict = field(default_factory=dict)  # the program when it draws, besides
    options: dict = field(default_factory=dict)  # of the program when it opens
    made_of: str = 'the real size'

ONE_FILE = {'one file': single_file}
FAMILIES = {
    'Stable Diffusion 1.x': Family(latent_diffusion('Stable Diffusion 1.x'), ONE_FILE, '2.5017'),
    'Stable Diffusion 2.x': Family(latent_diffusion('Stable Diffusion 2.x'), ONE_FILE, '2.5017'),
    'SDXL': Family(latent_diffusion('SDXL'), ONE_FILE, '2.5017'),
    'Stable Diffusion 3': Family(sd3, ONE_FILE, made_of='the size of SD3 medium, no T5'),
    'FLUX.1': Family(
        flux, {'one file': single_file, 'one file, T5 left out': without_t5}, tell=dict(guidance=3.5),
        made_of='width 256, one block of each kind; T5 of one block'),
    'Qwen-Image': Family(
        qwen_image, {'the folder': folder_parts, 'the folder, its VAE by the original names': folder_with_original_vae},
        made_of='one block; language model of two layers'),
    'Z-Image': Family(
        z_image, {'the folder': folder_parts, 'one file, and the language model apart': z_image_file},
        options=dict(wtype='q4_0'), made_of='the real size, read in four bits; language model of three layers'),
}

# ---- what the program says

def names_in(file) -> list[str]:
    with safe_open(file, 'pt') as f: return list(f.keys())

def run(python, opened: dict, family: Family, out: Path) -> dict:
    "One try: what was said of the tensors, and whether there is a picture"
    told = dict(width=SIDE, height=SIDE, seed=SEED, cfg_scale=1.0, sample_method='euler',
                sigmas=f'{family.sigma},0.0') | family.tell
    opens = {k: str(v) for k, v in opened.items()} | family.options
    command = [python, '-c', DRAW, json.dumps(opens), json.dumps(told | dict(prompt=PROMPT)), out.with_suffix('.png')]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env=os.environ | dict(PYTHONPATH=''))
    said = done.stdout + done.stderr
    out.with_suffix('.txt').write_text(said)
    found = lambda pattern: sorted(set(re.findall(pattern, said)))
    kinds = lambda names: sorted({re.sub(r'\d+', '#', k) for k in names})
    unknown = [t.split(' | ')[0].strip() for t in found(r"unknown tensor '(.*?)' in model file")]
    missing, shapes = found(r"tensor '(.*?)' not in model file"), found(r"tensor '(.*?)' has wrong shape")
    return dict(
        told=told | family.options, tensors=sum(len(names_in(v)) for v in opened.values()),
        unknown=len(unknown), unknown_kinds=kinds(unknown), missing=len(missing), missing_kinds=kinds(missing),
        wrong_shape=shapes, drawn=out.with_suffix('.png').is_file())

# ---- the same picture here

def condition(teacher, kind: str) -> dict:
    "What the program makes of the prompt: without T5 its places are zeros, as many as a CLIP has, or 256"
    if kind == 'StableDiffusion3Pipeline': teacher.text.length = 77
    cond = teacher.text([PROMPT])
    if kind == 'FluxPipeline': cond['encoder_hidden_states'] = torch.zeros(1, 256, 4096)
    return cond

@torch.no_grad()
def draw_here(pipe, flow: bool) -> np.ndarray:  # [h,w,3] in 0..255
    "From the same noise and the same words"
    kind = type(pipe).__name__
    teacher = TEACHERS[kind].from_pipeline(pipe, kind)
    teacher.set_size(SIDE, SIDE)
    z = torch.randn(teacher.latent_shape, generator=torch.Generator().manual_seed(SEED))[None]
    latents = one_step(teacher.denoiser, z, condition(teacher, kind), 1. if flow else T_INIT)
    return ((teacher.decode(latents)[0].permute(1, 2, 0) + 1)*127.5).clamp(0, 255).numpy()

def differences(picture: Path, here: np.ndarray) -> dict:
    "Of two pictures, in levels of 255; how far the levels of one spread"
    gap = np.abs(np.asarray(Image.open(picture).convert('RGB'), dtype=np.float64) - here)
    return {k: round(float(v), 2) for k, v in dict(off=gap.mean(), off_most=gap.max(), spread=here.std()).items()}

def row(name: str, python, folder: Path) -> dict:
    "Make, hand out, have it opened and drawn, draw it here"
    torch.manual_seed(0)
    family, tries, began = FAMILIES[name], {}, time.perf_counter()
    pipe = family.make()
    for what, files in family.tries.items():
        tries[what] = run(python, files(pipe, folder), family, folder/'drawn')
        if tries[what]['drawn'] and not isinstance(pipe, Parts):
            tries[what] |= differences(folder/'drawn.png', draw_here(pipe, family.sigma == '1.0'))
        for file in (*folder.glob('*.safetensors'), folder/'drawn.png'): file.unlink(missing_ok=True)
    return dict(made_of=family.made_of, tries=tries, date=f'{date.today()}', seconds=round(time.perf_counter() - began))

def versions() -> dict:
    return dict(program=f'stable-diffusion-cpp-python {VERSION}', diffusers=diffusers.__version__,
                transformers=transformers.__version__, torch=torch.__version__,
                machine=f'{platform.system()} {platform.machine()}')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('family', nargs='*', choices=[[], *FAMILIES])
    parser.add_argument('--python', type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    python, file = args.python or build(args.folder), args.folder/'families.json'
    rows = json.loads(file.read_text())['rows'] if file.is_file() else {}
    for name in args.family or FAMILIES:
        work = args.folder/'work'
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        rows[name] = row(name, python, work)
        ordered = {k: rows[k] for k in FAMILIES if k in rows}
        file.write_text(json.dumps(dict(**versions(), prompt=PROMPT, rows=ordered), indent=1) + '\n')
        print(name, json.dumps(rows[name], indent=1), flush=True)


if __name__ == '__main__':
    main()
