import re
import subprocess
import sys

import pytest
import torch

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.base import FakeTokenizer
from tokenmill.tokenizers.dct_fsq import VARIANTS, DctFsq
from tokenmill.tokenizers.load import load_tokenizer


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_under_its_name(variant: str) -> None:
    tokenizer = load_tokenizer(f"dct_fsq/{variant}")
    assert isinstance(tokenizer, DctFsq)
    assert tokenizer.spec.name == f"dct_fsq/{variant}"


def test_fake_loads() -> None:
    assert isinstance(load_tokenizer("fake"), FakeTokenizer)


def test_loading_the_fake_imports_no_other_family() -> None:
    code = (
        "import sys; from tokenmill.tokenizers.load import load_tokenizer; load_tokenizer('fake');"
        "print(*sorted(name for name in sys.modules if name.startswith('tokenmill.tokenizers.')))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["tokenmill.tokenizers.base", "tokenmill.tokenizers.load"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "dct_fqs/488_262144"},
            "unknown tokenizer family 'dct_fqs' in 'dct_fqs/488_262144' (did you mean 'dct_fsq'?):"
            " accepted are dct_fsq, fake",
        ),
        ({"name": ""}, "unknown tokenizer family '' in '': accepted are dct_fsq, fake"),
        (
            {"name": "dct_fsq/488_262143"},
            "dct_fsq has no variant '488_262143' (did you mean '488_262144'?):"
            " accepted are 488_262144, 488_32768, 41616_262144, 888_32768",
        ),
        ({"name": "dct_fsq"}, "dct_fsq has no variant '': accepted are 488_262144"),
        ({"name": "fake/large"}, "fake has no variants, found 'large': set the tokenizer to fake"),
        (
            {"name": "dct_fsq/488_32768", "weights": "/models/a.pt"},
            "dct_fsq has no weights, found '/models/a.pt': remove weights",
        ),
        ({"name": "fake", "weights": "a.pt"}, "fake has no weights, found 'a.pt': remove weights"),
        (
            {"name": "dct_fsq/488_32768", "dtype": "float16"},
            "dct_fsq computes in float32 alone, found dtype 'float16': set dtype to float32",
        ),
        ({"name": "fake", "device": "gpu"}, "unknown device 'gpu': accepted are cpu, cuda and cuda:N"),
        ({"name": "fake", "device": "meta"}, "unknown device 'meta': accepted are cpu, cuda and cuda:N"),
        (
            {"name": "dct_fsq/488_32768", "device": f"cuda:{torch.cuda.device_count()}"},
            f"device 'cuda:{torch.cuda.device_count()}' was asked for, torch finds {torch.cuda.device_count()} GPUs",
        ),
    ],
)
def test_refusals_say_what_is_accepted(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(TokenizerError, match="^" + re.escape(message)):
        load_tokenizer(**arguments)
