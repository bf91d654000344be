"""The transformer equals the authors' (tests/fixtures), masks included, and nothing sees its future."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dprl.errors import ConfigError
from dprl.interop import diffusion_policy
from dprl.networks.transformer import DenoisingTransformer, TransformerConfig
from dprl.seeding import seeded_init

FIXTURES = Path(__file__).parent.parent / "fixtures"
SETTINGS = json.loads((FIXTURES / "meta.json").read_text())
H, A, N_OBS, F = 6, 3, 3, 5


def build(**changes) -> DenoisingTransformer:
    sizes = {"n_layers": 2, "n_heads": 2, "embedding_size": 16, "attention_dropout": 0.0}
    with seeded_init(0, "transformer"):
        network = DenoisingTransformer(H, A, N_OBS, F, TransformerConfig(**sizes | changes))
        for parameter in network.parameters():  # as they are made, the outputs are near zero
            nn.init.normal_(parameter, std=0.3)
    return network


def inputs(batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy, condition = (torch.randn(batch, *size, generator=generator) for size in ((H, A), (N_OBS, F)))
    return noisy, torch.randint(0, 100, (batch,), generator=generator), condition


@pytest.fixture(scope="module")
def authors() -> tuple[DenoisingTransformer, dict[str, Tensor]]:
    data, s = load_file(FIXTURES / "dp_transformer.safetensors"), SETTINGS["dp_transformer"]
    config = TransformerConfig(
        n_layers=s["n_layer"],
        n_heads=s["n_head"],
        embedding_size=s["n_emb"],
        n_condition_layers=s["n_cond_layers"],
        embedding_dropout=s["p_drop_emb"],
        attention_dropout=s["p_drop_attn"],
        causal=s["causal_attn"],
        masks_observations=s["causal_attn"],
    )
    network = DenoisingTransformer(s["horizon"], s["input_dim"], s["n_obs_steps"], s["cond_dim"], config)
    theirs = {name: tensor for name, tensor in data.items() if not name.startswith("in.") and name != "out"}
    network.load_state_dict(diffusion_policy.transformer_state(theirs))
    return network, data


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_parity(authors: tuple[DenoisingTransformer, dict[str, Tensor]], training: bool, grad: bool) -> None:
    """In all modes: torch has another implementation of attention for evaluation without gradients."""
    network, data = authors
    network.train(training)
    with torch.set_grad_enabled(grad):
        out = network(data["in.sample"], data["in.timestep"], data["in.cond"])
    worst = float((out.detach() - data["out"]).abs().max() / data["out"].abs().max())
    print(f"parity {'dp_transformer':<28} {'out':<26} {worst:.1e}")
    assert worst < 1e-5


def test_masks_are_the_authors(authors: tuple[DenoisingTransformer, dict[str, Tensor]]) -> None:
    network, data = authors
    assert torch.equal(network.mask, data["mask"])
    assert torch.equal(network.memory_mask, data["memory_mask"])
    assert not {"mask", "memory_mask"} & network.state_dict().keys()


@pytest.mark.parametrize("n_condition_layers", [0, 2])
@pytest.mark.parametrize("step", range(H))
def test_a_causal_action_sees_no_later_action(step: int, n_condition_layers: int) -> None:
    network = build(n_condition_layers=n_condition_layers).eval()
    noisy, timestep, condition = inputs()
    changed = noisy.clone()
    changed[:, step:] += 1
    before, after = network(noisy, timestep, condition), network(changed, timestep, condition)
    torch.testing.assert_close(before[:, :step], after[:, :step])
    assert ((before - after)[:, step:].abs().amax(dim=(0, 2)) > 1e-4).all()


def test_masked_observations_are_seen_from_their_own_step_on() -> None:
    network = build(masks_observations=True).eval()
    noisy, timestep, condition = inputs()
    changed = condition.clone()
    changed[:, 2] += 1
    before, after = network(noisy, timestep, condition), network(noisy, timestep, changed)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert ((before - after)[:, 2:].abs().amax(dim=(0, 2)) > 1e-4).all()


def test_every_action_sees_the_latest_observation() -> None:
    """Chunks begin at the latest observation, so hiding it from the first action would make the policy act blindly."""
    network = build().eval()
    noisy, timestep, condition = inputs()
    changed = condition.clone()
    changed[:, -1] += 1
    difference = network(noisy, timestep, condition) - network(noisy, timestep, changed)
    assert (difference.abs().amax(dim=(0, 2)) > 1e-4).all()


def test_without_the_masks_everything_is_seen() -> None:
    network = build(causal=False).eval()
    noisy, timestep, condition = inputs()
    out = network(noisy, timestep, condition)
    later = torch.cat([noisy[:, :-1], noisy[:, -1:] + 1], dim=1)
    assert ((out - network(later, timestep, condition)).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_dropout_is_inactive_in_evaluation() -> None:
    network = build(embedding_dropout=0.5, attention_dropout=0.5)
    same = build()
    same.load_state_dict(network.state_dict())
    training = network(*inputs())
    assert not torch.allclose(training, network(*inputs()))
    torch.testing.assert_close(network.eval()(*inputs()), same(*inputs()))


@pytest.mark.parametrize(
    ("changes", "acts_on_condition"),
    [
        ({"embedding_dropout": 0.5}, True),
        ({"embedding_dropout": 0.5, "n_condition_layers": 1}, True),
        ({"attention_dropout": 0.5}, False),
        ({"attention_dropout": 0.5, "n_condition_layers": 1}, True),
    ],
    ids=str,
)
def test_each_dropout_acts_in_training_only(changes: dict, acts_on_condition: bool) -> None:
    """Alone, on the condition's tokens and on the actions'."""
    network = build(**changes).eval()
    noisy, timestep, condition = inputs()
    time = network.embed(timestep)
    prepared = network.prepare(time, condition)
    calls = (lambda: network.prepare(time, condition), lambda: network.denoise(noisy, prepared))
    evaluated = [call() for call in calls]
    torch.manual_seed(0)
    for training in (False, True):
        network.train(training)
        for call, reference, acts in zip(calls, evaluated, (acts_on_condition, True), strict=True):
            repeated = [call() for _ in range(2)]
            assert all(out.equal(reference) != (acts and training) for out in repeated)
            assert repeated[0].equal(repeated[1]) != (acts and training)


def test_each_dropout_has_its_own_share() -> None:
    network = build(embedding_dropout=0.1, attention_dropout=0.4, n_condition_layers=1)
    layers = [*network.encoder.modules(), *network.decoder.modules()]
    shares = [m.p for m in layers if isinstance(m, nn.Dropout)]
    shares += [m.dropout for m in layers if isinstance(m, nn.MultiheadAttention)]
    assert network.dropout.p == 0.1
    assert set(shares) == {0.4}


@pytest.mark.parametrize("n_condition_layers", [0, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_gradient_reaches_every_parameter_and_input(n_condition_layers: int, causal: bool) -> None:
    network = build(n_condition_layers=n_condition_layers, causal=causal)
    noisy, timestep, condition = inputs()
    noisy.requires_grad_()
    condition.requires_grad_()
    out = network(noisy, timestep, condition)
    assert out.shape == noisy.shape
    out.square().sum().backward()
    for name, tensor in {**dict(network.named_parameters()), "noisy": noisy, "condition": condition}.items():
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


def test_one_timestep_for_all_equals_it_repeated() -> None:
    network = build()
    noisy, _, condition = inputs()
    one = torch.tensor([17])
    torch.testing.assert_close(network(noisy, one, condition), network(noisy, one.expand(4), condition))
    torch.testing.assert_close(network(noisy, one.float(), condition), network(noisy, one, condition))


def test_a_chunk_of_one_action() -> None:
    network = DenoisingTransformer(1, A, 1, F, TransformerConfig(n_layers=1, embedding_size=8))
    assert network(torch.zeros(2, 1, A), torch.zeros(2), torch.zeros(2, 1, F)).shape == (2, 1, A)


def test_initialisation() -> None:
    with seeded_init(0, "initialisation"):
        network = DenoisingTransformer(16, A, 2, F, TransformerConfig(n_condition_layers=1))
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15), name
        else:
            norm = name.endswith("weight")
            assert (parameter == (1.0 if norm else 0.0)).all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers = 0: must be at least 1"),
        ({"n_heads": 0}, "n_heads = 0: must be at least 1"),
        ({"n_heads": 3}, "n_heads = 3: must divide embedding_size = 128"),
        ({"n_condition_layers": -1}, "n_condition_layers = -1: must be at least 0"),
        ({"embedding_size": 7}, "embedding_size = 7: must be an even number of at least 4"),
        ({"embedding_dropout": 1.0}, "embedding_dropout = 1.0: must be at least 0 and below 1"),
        ({"attention_dropout": -0.1}, "attention_dropout = -0.1: must be at least 0 and below 1"),
        ({"attention_dropout": float("nan")}, "attention_dropout = nan: must be a finite number"),
        ({"causal": 1}, "causal = 1: must be of type bool"),
    ],
)
def test_configs_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**changes)
