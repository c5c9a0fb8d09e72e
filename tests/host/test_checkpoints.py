"""Weights from files: every dialect loads, every bad file is refused with all that is wrong, and no code runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor, nn

from edgeres import models
from edgeres.artifacts import Preprocessing
from edgeres.errors import CheckpointError
from edgeres.models.checkpoints import PREFIXES, WRAPPERS
from edgeres.preprocess import prepare

Weights = dict[str, Tensor]


def small() -> nn.Module:
    """Return a net with a convolution, a batch norm, a projection and a classifier, its names torchvision's."""
    model = nn.Module()
    model.add_module("conv1", nn.Conv2d(3, 4, 3, bias=False))
    model.add_module("bn1", nn.BatchNorm2d(4))
    block = nn.Module()
    block.add_module("downsample", nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)))
    model.add_module("layer1", nn.Sequential(block))
    model.add_module("fc", nn.Linear(8, 5))
    return model


def trained() -> Weights:
    """Return weights for :func:`small`, all different from fresh ones, running statistics included."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 7
        for name, tensor in small().state_dict().items()
    }


def values(model: nn.Module) -> Weights:
    """Return a copy of what inference depends on."""
    return {name: t.clone() for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def assert_loads(path: Path, weights: Weights) -> None:
    model = small()
    models.load_weights(model, path)
    for name, tensor in values(model).items():
        assert torch.equal(tensor, weights[name]), name
        assert tensor.dtype is torch.float32


def assert_refused(path: Path, *words: str) -> CheckpointError:
    """Assert that a file is refused with all these words, and that the model is as it was."""
    model = small()
    before = values(model)
    with pytest.raises(CheckpointError) as caught:
        models.load_weights(model, path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    after = values(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    return caught.value


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt", ".bin", ".PTH"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_load(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(trained(), path, _use_new_zipfile_serialization=zipped)
    assert_loads(path, trained())


def test_safetensors_load(tmp_path: Path) -> None:
    save_file(trained(), tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", trained())


DIALECTS: dict[str, Callable[[Weights], object]] = {
    **{f"in {key}": (lambda weights, key=key: {"epoch": 3, key: weights}) for key in WRAPPERS},
    "in a wrapper of another name": lambda weights: {
        "epoch": 3,
        "ours": weights,
        "optimizer": {"state": {}, "lr": 0.1},
    },
    "in wrappers": lambda weights: {"model": {"state_dict": OrderedDict(weights)}},
    "beside averaged weights": lambda weights: {"state_dict_ema": {}, "state_dict": weights},
    "beside a tensor": lambda weights: {"best_accuracy": torch.tensor(0.9), "state_dict": weights},
    **{f"prefix {prefix}": (lambda weights, prefix=prefix: prefixed(prefix, weights)) for prefix in PREFIXES},
    "prefixes, nested": lambda weights: {"state_dict": prefixed("model._orig_mod.module.", weights)},
    "linear for fc": lambda weights: {name.replace("fc.", "linear."): tensor for name, tensor in weights.items()},
    "shortcut for downsample": lambda weights: {
        name.replace("downsample", "shortcut"): tensor for name, tensor in weights.items()
    },
    "all at once": lambda weights: {
        "net": {
            "module." + name.replace("fc.", "linear.").replace("downsample", "shortcut"): tensor
            for name, tensor in weights.items()
        }
    },
    "without step counts": lambda weights: {
        name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")
    },
    "with step counts of others": lambda weights: {**weights, "bn9.num_batches_tracked": torch.tensor(3)},
    "float step counts": lambda weights: {name: tensor.float() for name, tensor in weights.items()},
    "parameters": lambda weights: {
        name: nn.Parameter(tensor) if tensor.is_floating_point() else tensor for name, tensor in weights.items()
    },
    "double": lambda weights: {name: tensor.double() for name, tensor in weights.items()},
}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_dialects_load(tmp_path: Path, dialect: Callable[[Weights], object]) -> None:
    assert_loads(saved(tmp_path / "weights.pth", dialect(trained())), trained())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in trained().items()}
    assert_loads(saved(tmp_path / "weights.pt", narrow), {name: tensor.float() for name, tensor in narrow.items()})
    save_file(narrow, tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", {name: tensor.float() for name, tensor in narrow.items()})


@given(st.lists(st.sampled_from(PREFIXES), max_size=4), st.lists(st.sampled_from(WRAPPERS), max_size=4))
def test_prefixes_and_wrappers_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, prefixes: list[str], wrappers: list[str]
) -> None:
    content: object = prefixed("".join(prefixes), trained())
    for key in wrappers:
        content = {key: content}
    assert_loads(saved(tmp_path_factory.mktemp("any") / "weights.pt", content), trained())


def test_a_models_own_prefix_stays(tmp_path: Path) -> None:
    """A model whose attribute is called ``model`` has that prefix itself."""
    wrapped = nn.Module()
    wrapped.add_module("model", small())
    models.load_weights(wrapped, saved(tmp_path / "w.pt", prefixed("module.model.", trained())))
    assert torch.equal(wrapped.state_dict()["model.fc.bias"], trained()["fc.bias"])


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    weights = prefixed("module.", trained())
    weights["fc.bias"] = weights.pop("module.fc.bias")
    path = saved(tmp_path / "w.pt", weights)
    assert_refused(path, "module.fc.weight: unexpected", "fc.weight: missing")


def test_a_model_with_an_integer_buffer(tmp_path: Path) -> None:
    model = small()
    model.register_buffer("index", torch.zeros(3, dtype=torch.int64))
    path = saved(tmp_path / "w.pt", {**trained(), "index": torch.arange(3)})
    models.load_weights(model, path)
    assert model.get_buffer("index").tolist() == [0, 1, 2]
    saved(path, {**trained(), "index": torch.rand(3)})
    with pytest.raises(CheckpointError, match="index: the file has float32, the model wants int64"):
        models.load_weights(model, path)


def test_every_misfit_is_named_at_once(tmp_path: Path) -> None:
    weights = trained()
    del weights["bn1.bias"]
    weights["conv9.weight"] = torch.ones(2, 3)
    weights["fc.weight"] = torch.ones(7, 8)
    weights["conv1.weight"][0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    weights["fc.bias"] = torch.ones(5, dtype=torch.int8)
    weights["bn1.weight"] = torch.ones(4).to_sparse()
    weights["bn1.running_var"] = torch.full((4,), 1e300, dtype=torch.float64)
    problems = assert_refused(saved(tmp_path / "w.pt", weights)).problems
    expected = [
        "bn1.bias: missing in the file; the model wants (4)",
        "bn1.running_var: 4 of 4 values are NaN or infinite",
        "bn1.weight: sparse",
        "conv1.weight: 2 of 108 values are NaN or infinite",
        "conv9.weight: unexpected in the file, (2, 3)",
        "fc.bias: the file has int8, the model wants floats",
        "fc.weight: the model wants (5, 8), the file has (7, 8)",
    ]
    assert len(problems) == len(expected)
    for problem, start in zip(sorted(problems), expected, strict=True):
        assert problem.startswith(start)


@given(st.sets(st.sampled_from(sorted(values(small()))), min_size=1), st.sampled_from(["missing", "misshaped", "nan"]))
def test_all_and_only_the_bad_tensors_are_named(
    tmp_path_factory: pytest.TempPathFactory, bad: set[str], kind: str
) -> None:
    weights = trained()
    for name in bad:
        if kind == "missing":
            del weights[name]
        elif kind == "misshaped":
            weights[name] = torch.ones(*weights[name].shape, 2)
        else:
            weights[name].view(-1)[-1] = torch.nan
    if bad == set(values(small())) and kind == "missing":
        weights["other"] = torch.ones(1)
    problems = assert_refused(saved(tmp_path_factory.mktemp("bad") / "w.pt", weights)).problems
    assert {problem.split(":")[0] for problem in problems} - {"other"} == bad


def test_both_words_for_one_tensor(tmp_path: Path) -> None:
    weights = {**trained(), "linear.weight": torch.ones(5, 8)}
    assert_refused(saved(tmp_path / "w.pt", weights), "linear.weight: unexpected")


class Bomb:
    """Unpickled, it makes a folder: proof that code ran."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.crater),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_code_is_not_run(tmp_path: Path, zipped: bool, beside: bool) -> None:
    bomb = Bomb(tmp_path / "crater")
    content = {"state_dict": trained(), "optimizer": bomb} if beside else bomb
    path = tmp_path / "w.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_refused(path, "may be code", "mkdir", "torch.save(model.state_dict(), path)")
    assert not bomb.crater.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    bomb, path = Bomb(tmp_path / "crater"), tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    assert_refused(path, "state_dict()")
    assert not bomb.crater.exists()
    pickle.loads(path.read_bytes())
    assert bomb.crater.is_dir(), "the bomb is a real one"


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", models.create("resnet8_cifar", seed=0))
    assert_refused(path, "ResNet", "torch.save(model.state_dict(), path)")


def test_a_directory_of_a_gibibyte_is_not_read(tmp_path: Path) -> None:
    path, size = tmp_path / "w.pt", 1 << 30
    with open(path, "wb") as stream:
        stream.write(b"PK\x03\x04")
        stream.truncate(size)
        stream.seek(size)
        stream.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0))  # APPNOTE.TXT, 4.3.16
    assert_refused(path, "its directory has 1,073,741,824 bytes")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch discourages TorchScript, yet such files exist
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
        assert_refused(path, "TorchScript", "torch.save(model.state_dict(), path)")


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], torch.ones(1), {}, {"epoch": 3}, {0: torch.ones(1)}, {"a": {"w": trained()}, "b": 1}, None],
    ids=["list", "tensor", "empty dict", "numbers", "unnamed", "too deep", "none"],
)
def test_content_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    assert_refused(saved(tmp_path / "w.pt", content), "no named tensors", "torch.save(model.state_dict(), path)")


def test_a_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    assert_refused(saved(tmp_path / "w.pt", content), "no named tensors")


@pytest.mark.parametrize("name", ["weights.onnx", "weights.pkl", "weights"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    saved(tmp_path / name, trained())
    assert_refused(tmp_path / name, ".safetensors .pt .pth .th .ckpt .bin")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_none_are_refused(tmp_path: Path, suffix: str) -> None:
    assert_refused(tmp_path / f"absent{suffix}", "no such file")
    (tmp_path / f"folder{suffix}").mkdir()
    assert_refused(tmp_path / f"folder{suffix}", "a folder")
    (tmp_path / f"empty{suffix}").touch()
    assert_refused(tmp_path / f"empty{suffix}", "empty")
    (tmp_path / f"text{suffix}").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert_refused(tmp_path / f"text{suffix}", "no intact", "again")


def encoded(kind: str) -> bytes:
    """Return the weights of :func:`trained` as a file of one of the three formats."""
    if kind == "safetensors":
        return save(trained())
    buffer = io.BytesIO()
    torch.save(trained(), buffer, _use_new_zipfile_serialization=kind == "zip")
    return bytes(buffer.getvalue())


FORMATS = {kind: encoded(kind) for kind in ("safetensors", "zip", "legacy")}


@given(st.sampled_from(sorted(FORMATS)), st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(tmp_path_factory: pytest.TempPathFactory, kind: str, share: float) -> None:
    content = FORMATS[kind]
    path = tmp_path_factory.mktemp("cut") / ("w.safetensors" if kind == "safetensors" else "w.pt")
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(path)


@given(st.sampled_from(sorted(FORMATS)), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=64))
def test_damaged_files_are_refused_or_load(
    tmp_path_factory: pytest.TempPathFactory, kind: str, share: float, noise: bytes
) -> None:
    """Damage to a value may pass unseen, but weights stay finite, and nothing but a CheckpointError is raised."""
    content = bytearray(FORMATS[kind])
    at = int(share * len(content))
    content[at : at + len(noise)] = noise
    path = tmp_path_factory.mktemp("hurt") / ("w.safetensors" if kind == "safetensors" else "w.pt")
    path.write_bytes(bytes(content))
    model = small()
    before = values(model)
    try:
        models.load_weights(model, path)
    except CheckpointError:
        assert all(torch.equal(tensor, before[name]) for name, tensor in values(model).items())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in values(model).values())


@pytest.mark.parametrize(
    ("name", "file", "top1"),
    [("resnet20_cifar", "resnet20-12fca82f.th", 0.9125), ("resnet32_cifar", "resnet32-d509ac18.th", 0.9314)],
)
def test_published_checkpoints_reach_their_accuracy(shared_data: Path, name: str, file: str, top1: float) -> None:
    model = models.create(name)
    models.load_weights(model, shared_data / "cifar10" / "checkpoints" / file)
    paths = sorted((shared_data / "cifar10" / "validation").rglob("*.png"))
    classes = sorted({path.parent.name for path in paths})
    preprocessing = Preprocessing(size=(32, 32))
    images = np.stack([prepare(np.asarray(Image.open(path).convert("RGB")), preprocessing) for path in paths])
    labels = torch.tensor([classes.index(path.parent.name) for path in paths])
    with torch.inference_mode():
        correct = model(torch.from_numpy(images)).argmax(dim=1) == labels
    assert len(paths) == 423
    assert round(float(correct.double().mean()), 4) == top1
