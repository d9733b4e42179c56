"""Weights load where every tensor fits, from anywhere, and nothing else loads."""

import hashlib
import importlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers import vidtok_model
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.vidtok import VidTokTokenizer, build
from tokenmill.tokenizers.weights import fetch_folder

from .vidtok_kit import clip, filled

NAME = "fsq_causal_488_4096"
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vidtok_model, "WIDTH", 16)
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))


@pytest.fixture
def state() -> State:
    return dict(filled(build(NAME)).state_dict())


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """saved(values, name=...): the path of a checkpoint with them."""

    def save(values: Any, name: str = f"vidtok_{NAME}.ckpt") -> str:
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file({key: value.contiguous() for key, value in values.items()}, path)
        else:
            torch.save(values, path)
        return str(path)

    return save


def codes_by(weights: str, name: str = NAME) -> torch.Tensor:
    tokenizer = load_tokenizer(f"vidtok/{name}", weights=weights)
    with torch.inference_mode():
        return tokenizer.encode(clip(5, 16, 16).unsqueeze(0))


def test_what_training_and_compiling_add_is_left_out(state: State, saved: Callable[..., str]) -> None:
    wanted = codes_by(saved(state))
    more = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros((), dtype=torch.int64)}
    compiled = {key.replace("encoder.", "encoder._orig_mod."): value for key, value in state.items()}
    assert torch.equal(codes_by(saved({"state_dict": state | more, "global_step": 7})), wanted)
    assert torch.equal(codes_by(saved(compiled | more)), wanted)
    assert torch.equal(codes_by(saved(state, "x.safetensors")), wanted)
    assert len(torch.unique(wanted)) > 4


def test_old_checkpoints_of_torch_load(state: State, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    assert codes_by(str(path)).shape == (1, 2, 2, 2)


def test_the_digest_of_the_file_is_part_of_what_the_tokenizer_is(state: State, saved: Callable[..., str]) -> None:
    path = saved(state)
    found = load_tokenizer(f"vidtok/{NAME}", weights=path).spec.weights_sha256
    assert found == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_weights_at_a_url_are_downloaded_once_and_again_when_they_change(
    state: State, saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, downloads = saved(state), []
    store = fsspec.filesystem("memory")
    store.pipe_file("/weights/w.ckpt", Path(path).read_bytes())
    get_file = type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda *args, **kw: downloads.append(1) or get_file(*args, **kw))
    first, second = (load_tokenizer(f"vidtok/{NAME}", weights="memory://weights/w.ckpt") for _ in range(2))
    assert first.spec == second.spec == load_tokenizer(f"vidtok/{NAME}", weights=path).spec
    assert len(downloads) == 1
    state["encoder.mid.norm_unused"] = torch.zeros(1)
    store.pipe_file("/weights/w.ckpt", Path(saved(state)).read_bytes())
    with pytest.raises(TokenizerError, match=r"1 not known \(encoder.mid.norm_unused\)"):
        load_tokenizer(f"vidtok/{NAME}", weights="memory://weights/w.ckpt")
    assert len(downloads) == 2


def test_other_tensors_are_refused_with_the_first_differences(state: State, saved: Callable[..., str]) -> None:
    for key in ("encoder.conv_in.conv.bias", "decoder.conv_out.conv.bias"):
        state.pop(key)
    state["extra"] = torch.zeros(1)
    state["encoder.mid.block_1.norm1.norm.weight"] = torch.zeros(3)
    state["decoder.conv_in.conv.bias"] = torch.zeros(64, dtype=torch.int8)
    with pytest.raises(TokenizerError) as refused:
        codes_by(saved(state))
    said = str(refused.value)
    assert f"they are not those of vidtok/{NAME}" in said
    assert "2 missing (encoder.conv_in.conv.bias, decoder.conv_out.conv.bias)" in said
    assert "1 not known (extra)" in said
    assert "2 of another shape (encoder.mid.block_1.norm1.norm.weight is (3,), not (64,)" in said
    assert "decoder.conv_in.conv.bias is no numbers, not (64,)" in said
    assert "name the variant that the file holds" in said


def test_the_weights_of_another_variant_are_refused(state: State, saved: Callable[..., str]) -> None:
    with pytest.raises(TokenizerError, match="they are not those of vidtok/fsq_causal_488_32768"):
        codes_by(saved(state, "x.ckpt"), "fsq_causal_488_32768")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no checkpoint"), "not a readable checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps(os.system, protocol=2)), "not a readable checkpoint"),
        (lambda path: torch.save([torch.zeros(1)], path), "it holds list, a state dict is wanted"),
        (lambda path: torch.save({"state_dict": 7}, path), "it holds int, a state dict is wanted"),
        (lambda path: None, "it does not exist: check the path or URL"),
    ],
    ids=["text", "code", "list", "number", "absent"],
)
def test_files_that_are_no_weights_are_refused(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "w.ckpt")
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(f"vidtok/{NAME}", weights=str(tmp_path / "w.ckpt"))


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(TokenizerError, match="not a readable checkpoint"):
        load_tokenizer(f"vidtok/{NAME}", weights=str(tmp_path / "w.safetensors"))


def test_the_hub_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "hf", raising=False)
    for name in [one for one in sys.modules if one.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails, installed or not
    with pytest.raises(TokenizerError, match="pip install huggingface_hub"):
        load_tokenizer(f"vidtok/{NAME}", weights="hf://microsoft/VidTok/checkpoints/x.ckpt")


def test_the_folder_of_a_model_is_fetched_once_and_named_by_its_contents(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    contents = {"config.json": b"{}", "model.safetensors": b"abc", "README.md": b"not wanted"}
    remote = fsspec.filesystem("memory")
    for name, data in contents.items():
        (tmp_path / "here" / name).write_bytes(data)
        remote.pipe_file(f"/models/one/{name}", data)
    here, there = fetch_folder(str(tmp_path / "here")), fetch_folder("memory://models/one")
    assert here.sha256 == there.sha256
    assert here.path == str(tmp_path / "here")
    assert sorted(os.listdir(there.path)) == ["config.json", "model.safetensors"]
    assert fetch_folder("memory://models/one").path == there.path
    remote.pipe_file("/models/one/config.json", b"{} ")
    assert fetch_folder("memory://models/one").sha256 != there.sha256


@pytest.mark.parametrize("name", ["absent", "empty", "model.safetensors"])
def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(TokenizerError, match=r"does not exist|not a folder with \.json and \.safetensors files"):
        fetch_folder(str(tmp_path / name))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("vidtok_kl_causal_488_4chn_v1_1.ckpt", "kl_causal_488_4chn"),
        ("my-v1.1.ckpt", "kl_causal_488_4chn"),
        ("vidtok_kl_causal_488_4chn.ckpt", "kl_causal_488_4chn_v1_1"),
        ("vidtok-kl_causal_488_4chn.ckpt", "kl_causal_488_4chn_v1_1"),
    ],
)
def test_a_file_named_as_the_other_version_is_warned_of(saved: Callable[..., str], file: str, name: str) -> None:
    path = saved(dict(build(name).state_dict()), file)
    with pytest.warns(UserWarning, match=r"by its name the file holds version 1\.\d, and vidtok/\S+ is version 1\.\d"):
        assert isinstance(load_tokenizer(f"vidtok/{name}", weights=path), VidTokTokenizer)


@pytest.mark.parametrize("name", ["kl_causal_488_4chn", "kl_causal_488_4chn_v1_1"])
def test_a_file_without_a_version_in_its_name_is_taken_as_asked(saved: Callable[..., str], name: str) -> None:
    load_tokenizer(f"vidtok/{name}", weights=saved(dict(build(name).state_dict()), "mine.ckpt"))
