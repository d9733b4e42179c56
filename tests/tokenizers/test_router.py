"""Heads of a router learn what their features hold, come back from their file, and nothing else passes as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.router import (
    METADATA_KEY,
    PolicyHead,
    RelevanceHead,
    RouterAbout,
    RouterFile,
    pair_features,
    policy_loss,
    relevance_loss,
    save_router,
)

PAIR = RouterAbout(features="pair", of="siglip", relevance_dim=12, policy_dim=3, hidden=5)
EARLY = RouterAbout(features="early", of="ab12", layers=4, relevance_dim=7, hidden=5)

pytestmark = pytest.mark.usefixtures("one_thread")


def heads(about: RouterAbout) -> tuple[RelevanceHead | None, PolicyHead | None]:
    """Heads of these sizes, with random weights."""
    torch.manual_seed(0)
    relevance = None if about.relevance_dim is None else RelevanceHead(about.relevance_dim, about.hidden)
    return relevance, None if about.policy_dim is None else PolicyHead(about.policy_dim, about.hidden)


def test_pairs_hold_frame_text_product_and_difference() -> None:
    frames, texts = torch.tensor([[0.6, 0.8], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    wanted = [[0.6, 0.8, 1, 0, 0.6 * 2**0.5, 0, 0.4, 0.8], [0, 0, 0, 1, 0, 0, 0, 1]]
    torch.testing.assert_close(pair_features(frames, texts), torch.tensor(wanted) * 2**0.5)
    for scale in (3.0, 0.1):
        torch.testing.assert_close(
            pair_features(frames.half() * scale, texts), torch.tensor(wanted) * 2**0.5, atol=2e-3, rtol=0
        )


def test_a_head_over_pairs_compares_queries_that_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    queries_QD = F.normalize(torch.randn(200, 64, generator=generator), dim=-1)

    def pairs(queries_QD: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked_N = torch.randint(len(queries_QD), (number,), generator=generator)
        matches_N = torch.rand(number, generator=generator) < 0.5
        shown_N = torch.where(matches_N, asked_N, (asked_N + 1) % len(queries_QD))
        frames_ND = queries_QD[shown_N] + torch.randn(number, 64, generator=generator) / 4
        return pair_features(frames_ND, queries_QD[asked_N]), matches_N

    features_NF, labels_N = pairs(queries_QD[:100], 2000)
    head, _ = heads(RouterAbout(features="pair", of="", relevance_dim=256, hidden=64))
    assert head is not None
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
    for _ in range(4):
        for batch in torch.randperm(2000, generator=generator).split(32):
            optimizer.zero_grad()
            relevance_loss(head(features_NF[batch]), labels_N[batch], 1.0).backward()
            optimizer.step()
    features_NF, labels_N = pairs(queries_QD[100:], 500)
    assert ((head(features_NF) > 0) == labels_N).float().mean() > 0.9


def test_losses_are_cross_entropies() -> None:
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, True])
    p = torch.sigmoid(logits)
    for weight in (1.0, 3.0):
        wanted = -(weight * p[0].log() + (1 - p[1]).log() + weight * p[2].log()) / 3
        torch.testing.assert_close(relevance_loss(logits, labels, weight), wanted)
    logits_N2, fragment_N = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.tensor([True, False])
    p_N2 = logits_N2.softmax(-1)
    torch.testing.assert_close(policy_loss(logits_N2, fragment_N), -(p_N2[0, 1].log() + p_N2[1, 0].log()) / 2)


@pytest.mark.parametrize("about", [PAIR, EARLY, RouterAbout(features="pair", of="clip", policy_dim=3)])
def test_a_saved_router_comes_back_as_it_was(tmp_path: Path, about: RouterAbout) -> None:
    path = str(tmp_path / "router.safetensors")
    relevance, policy = heads(about)
    save_router(path, about, relevance, policy, {"step": "12"})
    file = RouterFile.read(path)
    assert (file.about, file.extra) == (about, {"step": "12"})
    if relevance is not None:
        x = torch.randn(6, about.relevance_dim or 0)
        assert torch.equal(file.relevance()(x), relevance(x))
        assert relevance(x).shape == (6,)
    else:
        with pytest.raises(TokenizerError, match="has no relevance head, which scores frames, only one for policy"):
            file.relevance()
    if policy is not None:
        x = torch.randn(6, about.policy_dim or 0)
        assert torch.equal(file.policy()(x), policy(x))
        assert policy(x).shape == (6, 2)
    else:
        with pytest.raises(TokenizerError, match=r"has no policy head, .*, only one for relevance"):
            file.policy()


def test_the_same_router_gives_the_same_bytes(tmp_path: Path) -> None:
    extra = {name: name for name in "abcdefgh"}
    for name in ("a", "b"):
        save_router(str(tmp_path / name), PAIR, *heads(PAIR), dict(reversed(extra.items())) if name == "b" else extra)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_router(str(path), PAIR, *heads(PAIR))
    tensors, whole = load_file(path), path.read_bytes()
    about = {"features": "pair", "of": "siglip", "relevance_dim": 12, "policy_dim": 3, "hidden": 5}

    def refusal(said: Any, tensors: dict[str, torch.Tensor]) -> pytest.ExceptionInfo[TokenizerError]:
        save_file(tensors, path, metadata=None if said is None else {METADATA_KEY: json.dumps(said)})
        with pytest.raises(TokenizerError) as caught:
            RouterFile.read(str(path))
        return caught

    assert refusal(None, tensors).match(
        "not those of a router.*KeyError.*give the file that training of a router wrote"
    )
    assert refusal([about], tensors).match("not those of a router.*no object")
    for wrong in (
        {},
        {"about": about | {"depth": 3}},
        {"about": about | {"features": "late"}},
        {"about": about | {"hidden": "5"}},
    ):
        assert refusal(wrong, tensors).match("this version knows no router such as their metadata describe")
    name = "relevance.layers.1.bias"
    said = {"about": about}
    assert refusal(said, {**tensors, name: torch.zeros(3)}).match(
        r"the router that its metadata.*1\.bias is \(3,\), not"
    )
    assert refusal(said, {key: tensors[key] for key in tensors if key != name}).match(rf"1 missing \({name}\)")
    assert refusal({"about": about | {"policy_dim": None}}, tensors).match("6 not known")
    for damaged in (b"nothing of the kind", whole[:-4]):
        path.write_bytes(damaged)
        with pytest.raises(TokenizerError, match=r"not those of a router, a \.safetensors file with tokenmill\.router"):
            RouterFile.read(str(path))
    with pytest.raises(TokenizerError, match="it does not exist: check the path"):
        RouterFile.read(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"features": "late"},
        {"features": "early"},
        {"layers": 4},
        {"features": "early", "layers": 0},
        {"relevance_dim": None},
        {"policy_dim": 0},
        {"hidden": 0},
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"features are pair, or early with their layers|a router has a head or two"):
        RouterAbout(**{"features": "pair", "of": "clip", "relevance_dim": 8, **wrong})


def test_heads_unlike_what_is_said_of_them_are_refused(tmp_path: Path) -> None:
    relevance, policy = heads(PAIR)
    for wrong in ((relevance, None), (None, policy), (RelevanceHead(11, 5), policy), (RelevanceHead(12, 6), policy)):
        with pytest.raises(ValueError, match=r"heads with the tensors .* are wanted"):
            save_router(str(tmp_path / "router.safetensors"), PAIR, *wrong)
