"""Prompts that are counted as longer than the text encoder reads are those whose last word it never sees.

The reference is the encoder itself: change the last word; if the conditioning does not change, it was cut off."""

import pytest
from sid_lsg_nb.core import max_abs
from sid_lsg_nb.testing import tiny_flux, tiny_sana, tiny_sd3
from sid_lsg_nb.testing import tiny_pixart
from sid_lsg_nb.data.prompts import count_truncated, prompts_from_list
from sid_lsg_nb.testing import tiny_qwen_image, tiny_sdxl, tiny_z_image
from sid_lsg_nb.teachers.registry import open_teacher

FAMILIES = dict(
    embedded=lambda f: 'embedded', sdxl=tiny_sdxl, pixart=tiny_pixart, sd3=tiny_sd3, sana=tiny_sana, flux=tiny_flux,
    qwen_image=tiny_qwen_image, z_image=tiny_z_image,
)

def read_to_the_end(text, n):
    "Does the last of n words matter?"
    a, b = (text(['a ' * (n - 1) + last]) for last in ('red', 'dog'))
    return any(max_abs(a[k].float(), b[k].float()) > 1e-6 for k in a)

@pytest.mark.parametrize('family', FAMILIES)
def test_last_word(family, tmp_path):
    text = open_teacher(FAMILIES[family](tmp_path / 't')).text
    tokens = max(text.token_counters())  # the encoder that reads most
    lo, hi = 1, tokens + 2  # words; every one is a token, or two
    assert read_to_the_end(text, lo) and not read_to_the_end(text, hi)
    while hi - lo > 1:
        mid = (lo + hi) // 2
        lo, hi = (mid, hi) if read_to_the_end(text, mid) else (lo, mid)
    longer = [
        count_truncated(prompts_from_list(['a ' * (n - 1) + 'red']), text)[-1]['longer'] for n in (lo, hi)
    ]
    assert longer == [0, 1], f'{lo} words are read, {hi} are cut: counted {longer}'
