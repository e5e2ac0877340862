import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import rvit_jax
from configs.base import get_config
from rvit_jax.layers import UnusedParam
from weights_converter import mapping
from weights_converter.torch_rvit import TorchRViT


def model_config(**overrides) -> ConfigDict:
    config = get_config().model
    config.update(image_size=16, hidden_size=12, num_heads=3, mlp_dim=20, num_classes=5)
    config.update(overrides)
    return config


def state_dict(config: ConfigDict) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    return {name: tensor.numpy() for name, tensor in TorchRViT(config).state_dict().items()}


configs = st.builds(
    model_config,
    num_layers=st.integers(1, 3),
    attention=st.sampled_from(["linear", "softmax", "reattention"]),
    readout=st.sampled_from(["class_token", "class_and_hidden_tokens"]),
    head=st.sampled_from(["linear", "mlp"]),
    unused_reattention=st.booleans(),
).filter(lambda config: config.attention != "reattention" or not config.unused_reattention)


@settings(max_examples=10)
@given(configs)
def test_round_trip_through_a_model_is_exact(config):
    weights = state_dict(config)
    model = rvit_jax.RViT(config, rngs=nnx.Rngs(0))
    mapping.load_into(model, mapping.to_flax(weights, config))
    back = mapping.to_torch(mapping.flatten(model), config)
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        assert back[name].dtype == array.dtype
        assert back[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
    # The reference's module takes it as it is.
    tensors = {name: torch.tensor(array) for name, array in back.items()}
    TorchRViT(config).load_state_dict(tensors, strict=True)


def test_layouts_by_hand():
    config = model_config()
    weights = state_dict(config)
    flat = mapping.to_flax(weights, config)
    linear = "transformer.layers.1.0.attention.to_qkv_h.weight"
    kernel = flat["layers", 1, "attention", "to_qkv_hidden", "kernel"]
    assert kernel.shape == (12, 36)
    assert kernel[3, 30] == weights[linear][30, 3]
    assert flat["patch_embedding", "kernel"].shape == (8, 8, 3, 12)
    assert flat["patch_embedding", "kernel"][6, 1, 2, 9] == weights["embedding.weight"][9, 2, 6, 1]
    assert all(array.flags.c_contiguous for array in flat.values())


def test_every_row_of_the_table_is_a_name_of_its_own():
    assert len({row.torch for row in mapping.TABLE}) == len(mapping.TABLE)
    # Two heads share head/dense; a model has one of them.
    assert len({(row.flax, row.part) for row in mapping.TABLE}) == len(mapping.TABLE)


def test_data_parallel_prefix():
    config = model_config()
    weights = state_dict(config)
    prefixed = {f"module.{name}": array for name, array in weights.items()}
    plain = mapping.to_flax(weights, config)
    assert all(
        np.array_equal(array, plain[path])
        for path, array in mapping.to_flax(prefixed, config).items()
    )
    with pytest.raises(ValueError, match=r"extra: module\._cls"):
        mapping.to_flax(weights | {"module._cls": weights["_cls"]}, config)


def test_all_that_is_wrong_is_said_at_once():
    config = model_config()
    weights = state_dict(config)
    del weights["_cls"], weights["classifier.1.bias"]
    weights["transformer.layers.2.0.mlp.net.0.bias"] = np.zeros(20, np.float32)
    weights["embedding.weight"] = np.zeros((12, 3, 4, 4), np.float32)
    weights["embedding.bias"] = np.zeros(13, np.float32)
    with pytest.raises(ValueError, match=r"PyTorch weights do not fit config\.model") as failure:
        mapping.to_flax(weights, config)
    message = str(failure.value)
    assert "missing: _cls, classifier.1.bias" in message
    assert "extra: transformer.layers.2.0.mlp.net.0.bias" in message
    assert "embedding.weight is [12, 3, 4, 4], expected [12, 3, 8, 8]" in message
    assert "embedding.bias is [13], expected [12]" in message
    assert "\n" not in message


def test_the_way_back_is_audited_too():
    config = model_config()
    flat = mapping.to_flax(state_dict(config), config)
    dense = flat.pop(("head", "dense", "kernel"))
    flat["head", "other", "kernel"] = dense
    flat["class_token",] = np.zeros((1, 12), np.float32)
    model = rvit_jax.RViT(config, rngs=nnx.Rngs(0))
    before = mapping.flatten(model)
    for attempt in (
        lambda: mapping.to_torch(flat, config),
        lambda: mapping.load_into(model, flat),
    ):
        with pytest.raises(ValueError, match="Flax weights") as failure:
            attempt()
        message = str(failure.value)
        assert "missing: head/dense/kernel" in message
        assert "extra: head/other/kernel" in message
        assert "class_token is [1, 12], expected [1, 1, 12]" in message
    after = mapping.flatten(model)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_unused_reattention_keeps_its_variable_type():
    config = model_config(attention="softmax", unused_reattention=True)
    model = rvit_jax.RViT(config, rngs=nnx.Rngs(0))
    weights = state_dict(config)
    mapping.load_into(model, mapping.to_flax(weights, config))
    attention = model.layers[1].attention
    assert isinstance(attention.reattention_kernel, UnusedParam)
    assert isinstance(attention.reattention_norm.scale, UnusedParam)
    name = "transformer.layers.1.0.attention.reattn_weights"
    assert np.array_equal(attention.reattention_kernel[...], weights[name])
