"""Plans and machines that fit each other, and the sentences for those that do not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edgeres.backends.tensorrt import compat, lean, module

ORIN = {
    "flavour": "tensorrt",
    "tensorrt": "10.3.0",
    "compute_capability": "8.7",
    "device": "Orin",
    "module": "NVIDIA Jetson AGX Orin Developer Kit",
    "cuda": "12.6",
    "platform": "Linux aarch64",
}
SERVER = {
    "flavour": "tensorrt",
    "tensorrt": "10.13.2",
    "compute_capability": "8.9",
    "device": "NVIDIA L4",
    "module": "",
    "cuda": "13.0",
    "platform": "Linux x86_64",
}
MEND = "Compile it here: edgeres compile build/resnet50-int8"


def problems(built_for: dict[str, str], here: dict[str, str]) -> list[str]:
    return compat.problems(built_for, here, "build/resnet50-int8")


@pytest.mark.parametrize("machine", [ORIN, SERVER])
def test_a_plan_fits_where_it_was_built(machine: dict[str, str]) -> None:
    assert problems(machine, machine) == []


def test_everything_that_does_not_fit_stands_in_one_sentence() -> None:
    assert problems({**SERVER, "tensorrt": "10.3.0", "compute_capability": "8.7"}, SERVER) == [
        f"engine was built for TensorRT 10.3.0, sm_87; this machine has 10.13.2, sm_89. {MEND}"
    ]
    assert problems(SERVER, ORIN) == [
        "engine was built for TensorRT 10.13.2, sm_89, CUDA 13.0, Linux x86_64; "
        f"this machine has 10.3.0, sm_87, CUDA 12.6, Linux aarch64. {MEND}"
    ]


UNFIT = {
    "older TensorRT": ({"tensorrt": "10.2.0"}, {}, "TensorRT 10.2.0", "10.3.0"),
    "newer TensorRT": ({"tensorrt": "10.3.1"}, {}, "TensorRT 10.3.1", "10.3.0"),
    "another GPU": ({"compute_capability": "7.2"}, {}, "sm_72", "sm_87"),
    "no GPU": ({}, {"compute_capability": ""}, "sm_87", "no GPU"),
    "another module": (
        {"module": "NVIDIA Jetson Orin Nano Developer Kit"},
        {},
        "NVIDIA Jetson Orin Nano Developer Kit",
        "NVIDIA Jetson AGX Orin Developer Kit",
    ),
    "an older driver": ({"cuda": "13.0"}, {}, "CUDA 13.0", "CUDA 12.6"),
    "no driver": ({}, {"cuda": ""}, "CUDA 12.6", "no CUDA"),
    "another system": ({"platform": "Linux x86_64"}, {}, "Linux x86_64", "Linux aarch64"),
    "the other flavour": (
        {"flavour": "tensorrt-rtx", "tensorrt": "1.7.1"},
        {},
        "TensorRT for RTX 1.7.1",
        "TensorRT 10.3.0",
    ),
    "version-compatible, from a newer one": (
        {"tensorrt": "10.4.0", "version_compatible": "yes"},
        {"lean_runtimes": "10.4.0"},
        "TensorRT 10.4.0",
        "10.3.0",
    ),
    "version-compatible, newer, without its lean runtime": (
        {"tensorrt": "10.0.1", "version_compatible": "yes"},
        {},
        "TensorRT 10.0.1",
        "10.3.0 and no libnvinfer_lean.so.10.0.1, the lean runtime that this engine needs there",
    ),
    "version-compatible, with another lean runtime": (
        {"tensorrt": "8.6.1.6", "version_compatible": "yes"},
        {"lean_runtimes": "8.6.0, 10.0.1"},
        "TensorRT 8.6.1.6",
        "10.3.0 and no libnvinfer_lean.so.8.6.1, the lean runtime that this engine needs there",
    ),
    "not version-compatible, whatever is installed": (
        {"tensorrt": "10.0.1"},
        {"lean_runtimes": "10.0.1"},
        "TensorRT 10.0.1",
        "10.3.0",
    ),
    "version-compatible, two majors on": (
        {"tensorrt": "8.6.1", "version_compatible": "yes"},
        {"tensorrt": "11.4.0", "lean_runtimes": "8.6.1"},
        "TensorRT 8.6.1",
        "11.4.0",
    ),
    "not version-compatible": (
        {"tensorrt": "10.0.1", "version_compatible": "no"},
        {},
        "TensorRT 10.0.1",
        "10.3.0",
    ),
    "Ampere or newer, on Xavier": (
        {"hardware_compatible": "AMPERE_PLUS"},
        {"compute_capability": "7.2"},
        "sm_87",
        "sm_72",
    ),
    "the same capability only": (
        {"hardware_compatible": "SAME_COMPUTE_CAPABILITY"},
        {"compute_capability": "8.6"},
        "sm_87",
        "sm_86",
    ),
}


@pytest.mark.parametrize(("plan", "machine", "built", "here"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit(plan: dict[str, str], machine: dict[str, str], built: str, here: str) -> None:
    assert problems({**ORIN, **plan}, {**ORIN, **machine}) == [
        f"engine was built for {built}; this machine has {here}. {MEND}"
    ]


FITS = {
    "a newer driver": ({}, {"cuda": "13.2"}),
    "the driver's minor version": ({"cuda": "12.8"}, {}),
    "another GPU of the same capability": ({"device": "NVIDIA L40"}, {}),
    "a module that a container hides": ({}, {"module": ""}),
    "a plan from before modules": ({"module": ""}, {}),
    "version-compatible, newer": ({"tensorrt": "10.0.1.6", "version_compatible": "yes"}, {"lean_runtimes": "10.0.1"}),
    "version-compatible, from 8": (
        {"tensorrt": "8.6.1", "version_compatible": "yes"},
        {"lean_runtimes": "10.0.1, 8.6.1"},
    ),
    "version-compatible, on 11": (
        {"version_compatible": "yes"},
        {"tensorrt": "11.0.0", "lean_runtimes": "10.3.0"},
    ),
    "version-compatible, at home": ({"version_compatible": "yes"}, {}),
    "Ampere or newer": ({"hardware_compatible": "AMPERE_PLUS"}, {"compute_capability": "12.0"}),
    "no facts but the version": (dict.fromkeys(ORIN, "") | {"tensorrt": "10.3.0"}, {}),
}


@pytest.mark.parametrize(("plan", "machine"), FITS.values(), ids=FITS)
def test_what_fits(plan: dict[str, str], machine: dict[str, str]) -> None:
    assert problems({**ORIN, **plan}, {**ORIN, **machine}) == []


def test_tensorrt_for_rtx_takes_any_gpu() -> None:
    plan = {**SERVER, "flavour": "tensorrt-rtx", "tensorrt": "1.7.1", "compute_capability": "portable", "cuda": ""}
    here = {**SERVER, "flavour": "tensorrt-rtx", "tensorrt": "1.7.1"}
    assert problems(plan, here) == []
    assert problems(plan, {**here, "tensorrt": "1.6.1"}) == [
        f"engine was built for TensorRT for RTX 1.7.1; this machine has 1.6.1. {MEND}"
    ]


@pytest.mark.parametrize(
    ("built", "here", "wanted"),
    [
        ("8.6.1", "8.6.1", ""),
        ("8.6.1", "8.6.3", "8.6.1"),
        ("8.6.1.6", "10.3.0", "8.6.1"),
        ("10.3.0", "10.13.3.9", "10.3.0"),
        ("10.16.1.11", "11.4.0.106", "10.16.1"),
        ("11.0.0", "11.4.0", "11.0.0"),
        ("8.6.1", "11.0.0", ""),
        ("10.13.3", "10.3.0", ""),
        ("11.0.0", "10.16.1", ""),
        ("1.6.1", "1.7.1", ""),
    ],
)
def test_whose_lean_runtime_runs_a_version_compatible_plan(built: str, here: str, wanted: str) -> None:
    """NVIDIA's table: forward only, within a major version, from 8 to 10 and from 10 to 11; none for RTX."""
    plan = {"tensorrt": built, "version_compatible": "yes"}
    assert compat.lean_version(plan, {"tensorrt": here}) == wanted
    assert compat.lean_version({"tensorrt": built}, {"tensorrt": here}) == ""


def test_lean_runtimes_are_found_where_libraries_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in (
        (first, ("libnvinfer_lean.so.8.6.1", "libnvinfer_lean.so.10", "libnvinfer.so.10.3.0", "notes.txt")),
        (second, ("libnvinfer_lean.so.8.6.1", "libnvinfer_lean.so.10.13.3")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    monkeypatch.setattr(lean, "SYSTEM", (str(second),))
    monkeypatch.chdir(second)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path / 'absent'}:{first}::.")
    assert lean.lean_runtimes() == {
        "8.6.1": str(first / "libnvinfer_lean.so.8.6.1"),
        "10.13.3": str(second / "libnvinfer_lean.so.10.13.3"),
    }
    monkeypatch.setattr(lean, "SYSTEM", ())
    monkeypatch.setenv("LD_LIBRARY_PATH", ".")  # what lies in the working folder is not the system's
    assert lean.lean_runtimes() == {}
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert lean.lean_runtimes() == {}


@pytest.mark.parametrize(
    ("stated", "number", "wanted"),
    [
        ("10.3.0", 100700, (10, 7, 0)),  # a library of another version lies under the bindings: it builds the plan
        ("10.3.0.26", 100300, (10, 3, 0, 26)),
        ("8.5.2.2", 8503, (8, 5, 3)),
        ("11.4.0", 10701, (1, 7, 1)),
    ],
)
def test_what_lies_under_the_bindings_counts(
    monkeypatch: pytest.MonkeyPatch, stated: str, number: int, wanted: tuple[int, ...]
) -> None:
    library = SimpleNamespace(getInferLibVersion=lambda: number)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert module.library_version(SimpleNamespace(__name__="tensorrt", __version__=stated)) == wanted


def test_a_plan_that_tells_nothing() -> None:
    assert problems({}, ORIN) == [f"nothing says which TensorRT the engine was built for. {MEND}"]


def test_the_facts_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compat, "TREE", tmp_path)
    trt = ModuleType("tensorrt")
    trt.__version__ = "10.3.0"
    device = SimpleNamespace(name="NVIDIA L4", compute_capability=(8, 9), driver=(12, 6))
    facts = compat.this_machine(trt, device)
    assert facts == {**facts, "flavour": "tensorrt", "compute_capability": "8.9", "device": "NVIDIA L4", "module": ""}
    assert facts["cuda"] == "12.6"
    assert facts["tensorrt"].startswith("10.")
    assert facts["platform"].count(" ") == 1
    without = compat.this_machine(trt, None)
    assert set(without) == set(facts) == set(ORIN)
    assert [without[name] for name in ("compute_capability", "device", "cuda")] == ["", "", ""]


@pytest.mark.parametrize(
    ("compatible", "model", "name"),
    [
        (b"nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0", b"NVIDIA Jetson Orin Nano Developer Kit\0", None),
        (b"nvidia,tegra194\0", b"Jetson-AGX\0", "Jetson-AGX"),
        (b"raspberrypi,4-model-b\0", b"Raspberry Pi 4 Model B\0", ""),
    ],
)
def test_the_name_of_a_module(tmp_path: Path, compatible: bytes, model: bytes, name: str | None) -> None:
    (tmp_path / "compatible").write_bytes(compatible)
    (tmp_path / "model").write_bytes(model)
    assert compat.jetson_module(tmp_path) == ("NVIDIA Jetson Orin Nano Developer Kit" if name is None else name)


def test_a_machine_without_a_device_tree(tmp_path: Path) -> None:
    assert compat.jetson_module(tmp_path / "absent") == ""
