"""Trained nets of every kind keep their answers in int8: what was quantized is what each kind's rules put in int8."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch

import edgeres
from edgeres import models
from edgeres.artifacts import Preprocessing, QuantizedModel, Report, from_data
from edgeres.quantize import lint
from edgeres.recipe import dossier
from edgeres.samples import open_samples

NETS = Path(__file__).parent / "data/trained"
KINDS = ("plain", "wide", "projected", "resnext", "se_resnet", "se_resnext")
RANGES = ("symmetric", "shifted")
DIGITS = dossier() / "digits"
HALF = (0.5, 0.5, 0.5)


class Built(NamedTuple):
    """What a test reads of a bundle: the model, its plan, the report, and the logits before and after quantizing."""

    int8: onnx.ModelProto
    model: QuantizedModel
    report: Report
    reference: np.ndarray
    quantized: np.ndarray

    def modules(self, precision: str, op: str = "Conv") -> set[str]:
        """Return the torch modules of the nodes of a kind that are planned in this precision."""
        return {layer.module for layer in self.model.layers if (layer.op, layer.precision) == (op, precision)}


def build(kind: str, out: Path, activation_range: str, grouped: str) -> Built:
    """Build a net from its weights and the digits; another build in the same place shares what they have in common."""
    bundle = edgeres.build(
        model=f"family:{kind}", weights=NETS / f"{kind}.safetensors", precision="int8", out=out, input_size=(32, 32),
        resize=32, mean=HALF, std=HALF, calibration=DIGITS / "calibration", validation=DIGITS / "validation",
        activation_range=activation_range, grouped=grouped, recovery="fast", backend="cpu",
    )  # fmt: skip
    model = from_data(bundle.manifest.stages["quantize"].facts, QuantizedModel, "quantize")
    assert bundle.report is not None
    logits = [np.load(out / name)["logits"] for name in ("reference.npz", "quantized.npz")]
    return Built(onnx.load(out / "model.int8.onnx"), model, bundle.report, *logits)


def torch_answers(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what torch answers to the held-out digits, int64 (N,), and what is right."""
    net = models.from_callable(f"family:{kind}")
    models.load_weights(net, NETS / f"{kind}.safetensors")
    samples = open_samples(DIGITS / "validation", labelled=True)
    (images,) = samples.batches(Preprocessing((32, 32), 32, mean=HALF, std=HALF), len(samples))
    with torch.inference_mode():
        return net(torch.from_numpy(images)).argmax(dim=1).numpy(), np.asarray(samples.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_answers_as_float_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (NETS / f"{kind}.safetensors").stat().st_size < 300_000
    monkeypatch.chdir(NETS)  # where family:NAME is found
    answers, labels = torch_answers(kind)
    assert (answers == labels).mean() > 0.95  # it is trained
    for activation_range in RANGES if "resnext" in kind else RANGES[1:]:
        net = build(kind, tmp_path / "bundle", activation_range, "int8")
        assert net.model.activation_range == activation_range
        np.testing.assert_array_equal(net.reference.argmax(axis=1), answers)
        assert net.report.top1_reference == (answers == labels).mean()
        same = net.quantized.argmax(axis=1) == answers
        assert same.mean() >= 0.99
        assert abs(net.report.agreement - same.mean()) <= 0.002  # of the engine, which may round otherwise on a border
        onnx.checker.check_model(net.int8, full_check=True)
        assert lint(net.int8) == []
        gates = {module for module in net.modules("float") if ".se.fc" in module}
        assert net.modules("float") == gates
        assert len(gates) == (6 if kind.startswith("se_") else 0)
        assert net.modules("int8", "Gemm") == {"fc"}
        assert net.model.grouped_int8 == (3 if "resnext" in kind else 0)


@pytest.mark.parametrize("kind", ["resnext", "se_resnext"])
def test_groups_in_float_answer_so_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NETS)
    net = build(kind, tmp_path / "bundle", "symmetric", "float")  # as for a GPU
    grouped = {f"layer{stage}.0.conv2" for stage in (1, 2, 3)}
    assert {module for module in net.modules("float") if ".se.fc" not in module} == grouped
    assert not grouped & net.modules("int8")
    assert lint(net.int8) == []
    assert (net.quantized.argmax(axis=1) == net.reference.argmax(axis=1)).mean() >= 0.99
