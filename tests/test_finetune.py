"""Starting from another model: what is taken over, what is resized, what begins anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

import rvit_jax
from rvit_jax import initialise, optimizer, steps, train
from tests.jester_folder import CLASSES, labelled, make_set
from tests.small import random_video, saved_model, small_config

NAMES = ("a", "b", "c", "d", "e")


def fresh_state(config, *, ema=False) -> steps.TrainState:
    model = rvit_jax.RViT(config.model, rngs=nnx.Rngs(9))
    adamw = optimizer.make_optimizer(config.optimizer, lambda step: 0.0)
    return steps.create_train_state(model, adamw, ema=ema)[1]


def flat(state) -> dict[str, np.ndarray]:
    """Path -> array."""
    return {
        optimizer.path_string(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    }


def start_from(path, names=NAMES, *, ema=False, **model):
    """The parameters before and after, and the notes."""
    config = small_config(**{"num_classes": len(names), **model})
    config.init_from = str(path)
    state = fresh_state(config, ema=ema)
    before = flat(state.params)
    start = initialise.initialise(config, state, 3, names)
    assert (int(start.state.step), start.epochs) == (0, 0)
    if ema:
        for ours, theirs in zip(
            jax.tree.leaves(start.state.ema), jax.tree.leaves(start.state.params), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
            assert ours is not theirs  # one buffer cannot be given away twice
    return before, flat(start.state.params), "\n".join(start.notes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of classes a to e, and its parameters."""
    folder = saved_model(tmp_path_factory.mktemp("m") / "m", seed=3, class_names=NAMES)
    return folder, flat(nnx.state(rvit_jax.load(folder).model.module, nnx.Param))


def check_origin(before, after, theirs, *, fresh, changed=()):
    """Every parameter is theirs, but for `fresh`, which are as before, and `changed`."""
    for name, array in after.items():
        if name.startswith(tuple(changed)):
            continue
        expected = before if name.startswith(tuple(fresh)) else theirs
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


class TestClasses:
    def test_the_same_take_everything(self, trained):
        folder, theirs = trained
        before, after, notes = start_from(folder, ema=True)
        check_origin(before, after, theirs, fresh=["nothing"])
        assert "anew" not in notes

    @pytest.mark.parametrize("names", [("a", "b", "c", "d", "x"), ("a", "b", "c"), (*NAMES, "f")])
    def test_others_get_a_new_head(self, trained, names):
        folder, theirs = trained
        before, after, notes = start_from(folder, names, ema=True)
        check_origin(before, after, theirs, fresh=["head/"])
        assert f"the head begins anew: 5 classes there, {len(names)} here" in notes
        assert "as they begin, not loaded: head/dense/*, head/norm/*" in notes
        assert "the optimizer begins anew" in notes

    def test_another_order_is_put_right(self, trained):
        folder, theirs = trained
        names = ("c", "a", "e", "b", "d")
        _, after, notes = start_from(folder, names)
        for index, name in enumerate(names):
            there = NAMES.index(name)
            column = theirs["head/dense/kernel"][:, there]
            np.testing.assert_array_equal(after["head/dense/kernel"][:, index], column)
            assert after["head/dense/bias"][index] == theirs["head/dense/bias"][there]
        assert "another order" in notes


class TestShapes:
    def test_fewer_layers_take_the_lowest(self, trained):
        folder, theirs = trained
        before, after, notes = start_from(folder, num_layers=1)
        check_origin(before, after, theirs, fresh=["nothing"], changed=["hidden_class_token"])
        np.testing.assert_array_equal(after["hidden_class_token"], theirs["hidden_class_token"][:1])
        assert "left out: layers/1/attention/to_out/*" in notes

    def test_more_layers_begin_as_they_begin(self, trained):
        folder, theirs = trained
        before, after, notes = start_from(folder, num_layers=4)
        fresh = ["layers/2", "layers/3"]
        check_origin(before, after, theirs, fresh=fresh, changed=["hidden_class_token"])
        tokens = after["hidden_class_token"]
        np.testing.assert_array_equal(tokens[:2], theirs["hidden_class_token"])
        np.testing.assert_array_equal(tokens[2:], before["hidden_class_token"][2:])
        assert "layers/2-3/norm_hidden/*" in notes

    def test_a_head_that_reads_every_layer_begins_anew_with_their_number(self, tmp_path):
        readout = "class_and_hidden_tokens"
        folder = saved_model(tmp_path / "m", class_names=NAMES, readout=readout)
        _, _, notes = start_from(folder, num_layers=3, readout=readout)
        assert "the head begins anew: num_layers is 2 there, 3 here" in notes

    def test_a_larger_frame_has_resized_positions(self, trained):
        folder, theirs = trained
        before, after, notes = start_from(folder, image_size=32)
        check_origin(before, after, theirs, fresh=["nothing"], changed=["pos_embedding"])
        np.testing.assert_array_equal(after["pos_embedding"][:, 0], theirs["pos_embedding"][:, 0])
        assert "resized pos_embedding from [1, 5, 16] to [1, 17, 16]" in notes

    @pytest.mark.parametrize(("side", "new_side"), [(4, 7), (7, 4), (14, 24)])
    def test_positions_are_resized_as_pillow_would(self, side, new_side):
        grid = np.random.default_rng(0).normal(size=(side, side, 3)).astype(np.float32)
        positions = np.concatenate([np.ones((1, 1, 3)), grid.reshape(1, -1, 3)], 1)
        resized = initialise.resize_positions(jnp.asarray(positions, jnp.float32), new_side**2 + 1)
        size = (new_side, new_side)
        for channel in range(3):
            theirs = Image.fromarray(grid[..., channel]).resize(size, Image.Resampling.BICUBIC)
            ours = np.asarray(resized[0, 1:, channel]).reshape(size)
            np.testing.assert_allclose(ours, np.asarray(theirs), atol=2e-5)
        np.testing.assert_array_equal(resized[0, 0], np.ones(3))

    @settings(max_examples=20)
    @given(old=st.integers(2, 6), more=st.integers(0, 6), seed=st.integers(0, 1000))
    def test_a_larger_patch_gives_what_it_gave(self, old, more, seed):
        rng, new = np.random.default_rng(seed), old + more
        kernel = rng.normal(size=(old, old, 3, 4)).astype(np.float32)
        patch = rng.normal(size=(old, old, 3)).astype(np.float32)
        larger = np.stack(
            [
                Image.fromarray(patch[..., c]).resize((new, new), Image.Resampling.BICUBIC)
                for c in range(3)
            ],
            axis=-1,
        )
        resized = initialise.resize_patches(jnp.asarray(kernel), new)
        expected = np.einsum("ijc,ijcd->d", patch, kernel)
        ours = np.einsum("ijc,ijcd->d", larger, np.asarray(resized))
        np.testing.assert_allclose(ours, expected, atol=2e-4)

    def test_what_cannot_be_mended_is_refused(self, trained):
        with pytest.raises(ValueError, match="is another model") as error:
            start_from(trained[0], hidden_size=32, num_heads=8, num_layers=3)
        message = str(error.value)
        assert "hidden_size is 16 there, 32 here" in message
        assert "num_heads is 4 there, 8 here" in message
        assert "num_layers" not in message  # which could be mended


def vit_weights(*, layers=2, size=16, mlp=24, patch=8, tokens=5, classes=7) -> dict:
    """A ViT with random weights, by timm's names."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.3 * rng.normal(size=shape)).astype(np.float32)

    weights = {
        "cls_token": draw(1, 1, size),
        "pos_embed": draw(1, tokens, size),
        "patch_embed.proj.weight": draw(size, 3, patch, patch),
        "patch_embed.proj.bias": draw(size),
        "norm.weight": draw(size),
        "norm.bias": draw(size),
        "head.weight": draw(classes, size),
        "head.bias": draw(classes),
    }
    for layer in range(layers):
        for name, shape in (
            *(("norm1", (size,)), ("norm2", (size,))),
            *(("attn.qkv", (3 * size, size)), ("attn.proj", (size, size))),
            *(("mlp.fc1", (mlp, size)), ("mlp.fc2", (size, mlp))),
        ):
            weights[f"blocks.{layer}.{name}.weight"] = draw(*shape)
            weights[f"blocks.{layer}.{name}.bias"] = draw(shape[0])
    return weights


def hugging_face_names(weights: dict) -> dict:
    """The same by the names of Hugging Face's `ViTForImageClassification`."""
    renamed = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    out = {}
    for name, array in weights.items():
        stem, _, leaf = name.rpartition(".") if "." in name else (name, "", "")
        if not stem.startswith("blocks."):
            out[".".join(filter(None, (renamed[stem], leaf)))] = array
            continue
        _, layer, part = stem.split(".", 2)
        prefix = f"vit.encoder.layer.{layer}."
        if part != "attn.qkv":
            out[f"{prefix}{renamed[part]}.{leaf}"] = array
            continue
        for which, third in zip(("query", "key", "value"), np.split(array, 3), strict=True):
            out[f"{prefix}attention.attention.{which}.{leaf}"] = np.ascontiguousarray(third)
    return out


def torch_vit_block(x, weights, layer, num_heads):
    """A ViT's block, as timm's `Block.forward` is documented, with our epsilon."""
    w = {
        name.removeprefix(f"blocks.{layer}."): torch.from_numpy(array)
        for name, array in weights.items()
        if name.startswith(f"blocks.{layer}.")
    }
    f = torch.nn.functional
    size = x.shape[-1]

    def linear(x, name):
        return f.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return f.layer_norm(x, (size,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    qkv = linear(norm(x, "norm1"), "attn.qkv")
    q, k, v = qkv.reshape(*x.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    attended = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    x = x + linear(attended, "attn.proj")
    return x + linear(f.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


VIT_MODEL = {"attention": "softmax", "block_dropout_rate": 0.0, "mlp_dim": 24}


class TestVit:
    @pytest.mark.parametrize("rename", [dict, hugging_face_names])
    @pytest.mark.usefixtures("one_torch_thread")
    def test_without_the_state_a_block_is_the_vits(self, tmp_path, rename):
        weights = vit_weights()
        save_file(rename(weights), tmp_path / "vit.safetensors")
        before, after, notes = start_from(tmp_path / "vit.safetensors", **VIT_MODEL)
        for name in ("hidden_class_token", "layers/0/attention/to_qkv_hidden/kernel"):
            np.testing.assert_array_equal(after[name], before[name])
        assert "layers/0-1/attention/to_qkv_hidden/*, layers/0-1/norm_hidden/*" in notes
        left_out = "left out: " + ", ".join(
            sorted(n for n in rename(weights) if "head" in n or "classifier" in n)
        )
        assert left_out in notes

        config = small_config(num_classes=5, **VIT_MODEL)
        model = rvit_jax.RViT(config.model, rngs=nnx.Rngs(0))
        model.eval()
        variables = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(
            variables,
            nnx.to_pure_dict(variables)
            | _nested({name: jnp.asarray(array) for name, array in after.items()}),
        )
        nnx.update(model, variables)
        x = np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)
        for layer, block in enumerate(model.layers):
            block.attention.to_qkv_hidden.kernel[...] = jnp.zeros((16, 48))
            block.attention.to_qkv_hidden.bias[...] = jnp.zeros(48)
            ours, _ = block(jnp.asarray(x), jnp.asarray(x))
            theirs = torch_vit_block(torch.from_numpy(x), weights, layer, 4).numpy()
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        frame = random_video(2, 1)[:, 0]
        patches = torch.nn.functional.conv2d(
            torch.from_numpy(np.array(frame)).permute(0, 3, 1, 2),
            torch.from_numpy(weights["patch_embed.proj.weight"]),
            torch.from_numpy(weights["patch_embed.proj.bias"]),
            stride=8,
        )
        theirs = patches.flatten(2).transpose(1, 2).numpy()
        np.testing.assert_allclose(model.patch_embedding(frame), theirs, atol=1e-5)
        np.testing.assert_array_equal(after["class_token"], weights["cls_token"])
        np.testing.assert_array_equal(after["head/norm/scale"], weights["norm.weight"])

    def test_another_grid_and_patch(self, tmp_path):
        save_file(vit_weights(tokens=50, patch=4), tmp_path / "vit.safetensors")
        _, _, notes = start_from(tmp_path / "vit.safetensors", **VIT_MODEL)
        assert "pos_embedding from [1, 50, 16] to [1, 5, 16]" in notes
        assert "patch_embedding/kernel from [4, 4, 3, 16] to [8, 8, 3, 16]" in notes

    def test_a_head_of_other_width_leaves_the_last_norm_out(self, tmp_path):
        save_file(vit_weights(), tmp_path / "vit.safetensors")
        before, after, notes = start_from(
            tmp_path / "vit.safetensors", readout="class_and_hidden_tokens", **VIT_MODEL
        )
        np.testing.assert_array_equal(after["head/norm/scale"], before["head/norm/scale"])
        assert "left out: head/norm/*, head.bias, head.weight" in notes

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("blocks.1.mlp.fc2.bias"), r"it lacks blocks\.1\.mlp\.fc2\.bias"),
            (lambda w: w.pop("patch_embed.proj.weight"), "holds no ViT with timm's or Hugging"),
            (lambda w: w.update(pos_embed=np.ones((1, 6, 16), np.float32)), "a square of patches"),
            (lambda w: w.update(pos_embed=np.ones((5, 16), np.float32)), r"expected \[1, S, D\]"),
            (lambda w: w["norm.bias"].fill(np.nan), r"norm\.bias holds values that are not finite"),
            (
                lambda w: w.update({"blocks.0.mlp.fc1.bias": np.ones(9, np.float32)}),
                r"layers/0/mlp/dense_in/bias is \[9\], expected \[24\]",
            ),
            (
                lambda w: w.update({"patch_embed.proj.weight": np.ones((16, 3), np.float32)}),
                "this is no ViT's",
            ),
        ],
    )
    def test_other_files_are_refused_in_one_line(self, tmp_path, change, message):
        weights = vit_weights()
        change(weights)
        save_file(weights, tmp_path / "vit.safetensors")
        with pytest.raises(ValueError, match=message) as error:
            start_from(tmp_path / "vit.safetensors", **VIT_MODEL)
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)

    def test_other_widths_are_refused(self, tmp_path):
        save_file(vit_weights(), tmp_path / "vit.safetensors")
        with pytest.raises(ValueError, match=r"hidden_size is 16 there, 32 here; mlp_dim is 24 th"):
            start_from(
                tmp_path / "vit.safetensors", attention="softmax", hidden_size=32, mlp_dim=48
            )

    def test_damaged_missing_and_foreign_files(self, tmp_path):
        file = tmp_path / "vit.safetensors"
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            start_from(file)
        save_file(vit_weights(), file)
        whole = file.read_bytes()
        for damaged in (b"", b"<html>", whole[:100], whole[:-7]):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="cannot be read as safetensors"):
                start_from(file)
        name = "transformer.layers.0.0.attention.to_qkv_h.weight"
        save_file({name: np.ones((48, 16), np.float32)}, file)
        with pytest.raises(ValueError, match="python -m weights_converter to_flax"):
            start_from(file)


def _nested(flat_arrays: dict) -> dict:
    """Path -> array as nested dicts."""
    nested: dict = {}
    for name, array in flat_arrays.items():
        *parents, leaf = (int(part) if part.isdigit() else part for part in name.split("/"))
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = array
    return nested


def test_a_run_starts_from_another_of_other_classes(tmp_path, capsys):
    """The whole way: three classes, then two, of frames of another size."""
    rows = labelled(1, 8)
    data = make_set(tmp_path / "data", {"train": rows, "validation": rows}, num_frames=None)
    config = small_config(num_classes=3)
    config.dataset.update(data_dir=str(data), classes=CLASSES, num_frames=4)
    config.update(batch_size=4, num_epochs=1)
    train.train_and_evaluate(config, tmp_path / "three")
    config.init_from = str(tmp_path / "three")
    config.dataset.classes = CLASSES[:2]
    config.model.update(num_classes=2, image_size=24)
    config.ema_decay = 0.9
    capsys.readouterr()
    train.train_and_evaluate(config, tmp_path / "two")
    out = capsys.readouterr().out
    assert "the head begins anew: 3 classes there, 2 here" in out
    assert "resized pos_embedding from [1, 5, 16] to [1, 10, 16]" in out
    assert rvit_jax.load(tmp_path / "two").class_names == CLASSES[:2]
