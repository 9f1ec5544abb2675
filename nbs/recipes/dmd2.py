"""The frame of DMD2 (2405.14867) in one file, as a method of one's own.

    sid-lsg distill --method nbs/recipes/dmd2.py:dmd2 --real-images FOLDER --fake-updates 5

Diff-Instruct's gradient, several updates of the fake before each of the generator, and a head with weights of its own
that reads the fake's features and tells real pictures from generated ones. Its noise and times are those of the score's
forward (the paper's code draws them anew); --gan-layer, --gan-weight-generator, --gan-weight-discriminator, --gan-start
and --gan-freeze-generator-until mean what they mean for SiDA.
"""

from dataclasses import dataclass, replace
import torch
from torch import Tensor, nn
from sid_lsg_nb.core import InputError
from sid_lsg_nb.method.adversary import AdversarialTerm, Discriminator, DiscriminatorLoss
from sid_lsg_nb.method.losses import DiffInstruct, no_weight
from sid_lsg_nb.method.methods import Recipe, score_distillation
from sid_lsg_nb.method.steps import Method, Networks, Switch


class Head(nn.Module):
    "Features of the fake to a map of logits: at each place of the layer one number"

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.first, self.last = nn.Linear(channels, width), nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:  # [b, C, H, W] or [b, N, C] -> [b, places]
        x = features.flatten(2).mT if features.ndim == 4 else features
        return self.last(nn.functional.silu(self.first(x.to(self.first.weight.dtype)))).squeeze(2)


@dataclass(frozen=True)
class HeadDiscriminator(Discriminator):
    "A discriminator with weights of its own, on a layer of the fake"

    roles = ('discriminator',)

    def build(self, start) -> dict[str, nn.Module]:
        shape = start.features(self)
        return dict(discriminator=Head(shape[0] if len(shape) == 3 else shape[-1]))

    def logits(self, nets: Networks, out, B: int, train: bool = False) -> Tensor:  # [B, places]
        out = out[0] if isinstance(out, tuple) else out
        head = nets['discriminator']
        logits = (head.train if train else head.net)(out[-B:])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def dmd2(recipe: Recipe) -> Method:
    "DMD2 with the settings of a run; raises `InputError` without real pictures"
    a = recipe.adversary
    if a is None:
        raise InputError('dmd2 compares with real pictures; give a folder: --real-images FOLDER')
    method, head = score_distillation(replace(recipe, adversary=None), DiffInstruct()), HeadDiscriminator(a.layer)
    deceive = AdversarialTerm(head, no_weight, a.weight_generator, Switch(a.start))
    tell = DiscriminatorLoss(head, a.weight_discriminator, 'none')
    return replace(
        method, terms=(*method.terms, deceive), critics=(tell,), freeze_generator_until=a.freeze_generator_until)
