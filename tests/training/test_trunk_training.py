"""A trunk in training: published weights as a start, what nouns mean, learning rates of its parts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refsam.config import config_from_dict
from refsam.data.photographs.words import load_words
from refsam.errors import CheckpointError, ConfigError, UserError
from refsam.model.trunk import TRUNK_CLASSES, Trunk
from refsam.model.trunk_weights import load_trunk
from refsam.model.vocabulary import extend_vocabulary
from refsam.training.noun_loss import NounLoss
from refsam.training.optim import build_optimisers
from refsam.training.settings import OptimiserSettings, TrainingSettings
from tests.tiny_model import tiny_model, tiny_trunk_model


def write_weights(path: Path, classes: int = len(TRUNK_CLASSES), width: float = 0.5) -> Path:
    """A file like the published one, with random weights."""
    torch.manual_seed(1)
    tensors = dict(Trunk(width).state_dict())
    tensors["classifier.weight"] = torch.randn(classes, 256, 1, 1)
    tensors["classifier.bias"] = torch.randn(classes)
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path)
    return path


@torch.no_grad()
def test_the_first_names_are_the_published_scores(tmp_path: Path) -> None:
    model = tiny_trunk_model()
    path = write_weights(tmp_path / "trunk.safetensors")
    load_trunk(model, path)
    torch.manual_seed(1)
    published = Trunk(0.5).half().float()
    weight, bias = torch.randn(21, 256, 1, 1).half().float(), torch.randn(21).half().float()
    pixels = torch.rand(1, 3, 32, 64) * 2 - 1
    scores = torch.nn.functional.conv2d(published(pixels).context, weight, bias)
    names = model.trunk(pixels).names.transpose(1, 2)[:, :21].unflatten(2, (2, 4))
    torch.testing.assert_close(names, 0.2 * scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("classes", "width", "message"),
    [(20, 0.5, "class scores of 21 classes"), (21, 1.0, "of another shape")],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, classes: int, width: float, message: str
) -> None:
    path = write_weights(tmp_path / "trunk.safetensors", classes, width)
    with pytest.raises(CheckpointError, match=message):
        load_trunk(tiny_trunk_model(), path)


def test_a_missing_file_and_a_model_without_trunk_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        load_trunk(tiny_trunk_model(), tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="the model has none"):
        load_trunk(tiny_model(), write_weights(tmp_path / "trunk.safetensors"))
    both = {"model": {"preset": "nano"}, "stages": [], "output": "x", "init_from": "nano"}
    with pytest.raises(ConfigError, match="want init_from or trunk"):
        config_from_dict(TrainingSettings, both | {"trunk": "file"})


def test_nouns_are_learnt_without_pictures() -> None:
    model = tiny_trunk_model().train()
    extend_vocabulary(model.text_encoder, load_words().vocabulary())
    loss = NounLoss(model)
    swan = loss.texts.index("the swan")
    assert loss.wanted[swan].nonzero().flatten().tolist() == [0, TRUNK_CLASSES.index("bird")]
    assert not loss.wanted[loss.texts.index("the toothbrush")].any()
    first = loss(model)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(10):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()
    assert loss(model) < 0.8 * first


def test_nouns_of_unknown_words_are_left_out() -> None:
    texts = NounLoss(tiny_trunk_model()).texts
    assert "the dog" in texts and "the toothbrush" not in texts


def test_the_narrowest_learning_rate_counts() -> None:
    model = torch.nn.ModuleList([tiny_trunk_model()])
    settings = OptimiserSettings(
        learning_rate=1e-3, lr_overrides={"trunk": 5e-4, "trunk.network": 1e-4}
    )
    (adamw,) = build_optimisers(model, settings)
    rates = {id(p): group["scale"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(model[0].trunk.network.features[0].conv.weight)] == pytest.approx(0.1)
    assert rates[id(model[0].trunk.level.weight)] == pytest.approx(0.5)
    assert rates[id(model[0].noun_match.prompt)] == 1.0
    with pytest.raises(UserError, match=r"nothing to train in trunk\.nothing"):
        build_optimisers(model, OptimiserSettings(lr_overrides={"trunk.nothing": 1e-4}))
