"""Clocks, power and memory, read from trees like those of the kernel, and from a double of NVIDIA's library."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

import pytest

from edgeres.board import Reading, open_board, resident_bytes, summarize


def tree(root: Path, files: Dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def orin(root: Path) -> Path:
    """What a Jetson AGX Orin shows, as far as we read it: two INA3221, cpufreq, devfreq."""
    return tree(
        root,
        {
            "class/hwmon/hwmon0/name": "pwmfan\n",
            "class/hwmon/hwmon0/pwm1": "120\n",
            "class/hwmon/hwmon3/name": "ina3221\n",
            "class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
            "class/hwmon/hwmon3/in1_input": "19920\n",
            "class/hwmon/hwmon3/curr1_input": "640\n",
            "class/hwmon/hwmon3/in2_label": "VDD_CPU_CV\n",
            "class/hwmon/hwmon3/in2_input": "19912\n",
            "class/hwmon/hwmon3/curr2_input": "120\n",
            "class/hwmon/hwmon3/curr4_input": "760\n",  # the driver's sum of all currents
            "class/hwmon/hwmon3/in4_input": "1\n",  # and the first shunt's voltage: no rail of their own
            "class/hwmon/hwmon4/name": "ina3221\n",
            "class/hwmon/hwmon4/in1_label": "NC\n",
            "class/hwmon/hwmon4/in1_input": "0\n",
            "class/hwmon/hwmon4/curr1_input": "0\n",
            "class/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO\n",
            "class/hwmon/hwmon4/in2_input": "4984\n",
            "class/hwmon/hwmon4/curr2_input": "200\n",
            "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "2201600\n",
            "devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "729600\n",
            "class/devfreq/17000000.gpu/cur_freq": "1300500000\n",
            "class/devfreq/15880000.nvdla0/cur_freq": "1600000000\n",
        },
    )


def test_a_jetson_tells_clocks_and_the_power_of_each_rail(tmp_path: Path) -> None:
    found = open_board(orin(tmp_path)).read()
    assert found.clocks_mhz == pytest.approx({"cpu": 1465.6, "17000000.gpu": 1300.5, "15880000.nvdla0": 1600.0})
    assert found.power_watts == pytest.approx(
        {"VDD_GPU_SOC": 19.92 * 0.64, "VDD_CPU_CV": 19.912 * 0.12, "VDDQ_VDD2_1V8AO": 4.984 * 0.2}
    )


def test_power_in_microwatts_and_equal_names(tmp_path: Path) -> None:
    """An INA238 as on Thor, and two chips that name themselves alike."""
    files = {
        "class/hwmon/hwmon1/name": "ina238\n",
        "class/hwmon/hwmon1/power1_input": "12500000\n",
        "class/hwmon/hwmon2/name": "amdgpu\n",
        "class/hwmon/hwmon2/power1_average": "9000000\n",
        "class/hwmon/hwmon2/power1_label": "PPT\n",
        "class/hwmon/hwmon5/name": "ina238\n",
        "class/hwmon/hwmon5/power1_input": "250000\n",
    }
    found = open_board(tree(tmp_path, files)).read()
    assert found.power_watts == pytest.approx({"ina238": 12.5, "PPT": 9.0, "ina238 #2": 0.25})


def test_every_look_reads_anew_and_misses_what_does_not_answer(tmp_path: Path) -> None:
    board = open_board(orin(tmp_path))
    assert board.read().clocks_mhz["17000000.gpu"] == pytest.approx(1300.5)
    (tmp_path / "class/devfreq/17000000.gpu/cur_freq").write_text("306000000\n")
    (tmp_path / "class/hwmon/hwmon3/curr1_input").write_text("")
    (tmp_path / "class/hwmon/hwmon3/curr2_input").unlink()
    later = board.read()
    assert later.clocks_mhz["17000000.gpu"] == pytest.approx(306.0)
    assert set(later.power_watts) == {"VDDQ_VDD2_1V8AO"}


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert open_board(tmp_path / "nowhere").read() == Reading({}, {})


class Nvml:
    """As much of pynvml as is asked for; the second GPU does not tell its power."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, count: int) -> None:
        self.count = count

    def nvmlDeviceGetCount(self) -> int:
        if self.count < 0:
            raise self.NVMLError("driver not loaded")
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind] - handle

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise self.NVMLError("not supported")
        return 71_250


def test_nvidia_gpus(tmp_path: Path) -> None:
    found = open_board(tmp_path, Nvml(1)).read()
    assert found == Reading({"gpu": 1980.0, "gpu memory": 2619.0}, {"gpu": 71.25})
    found = open_board(tmp_path, Nvml(2)).read()
    assert found.clocks_mhz == {"gpu0": 1980.0, "gpu0 memory": 2619.0, "gpu1": 1979.0, "gpu1 memory": 2618.0}
    assert found.power_watts == {"gpu0": 71.25}
    assert open_board(tmp_path, Nvml(-1)).read() == Reading({}, {})


def test_readings_are_summarized_by_sensor() -> None:
    state = summarize(8, [Reading({"gpu": f}, {"gpu": 10.0} if f > 800 else {}) for f in (900.0, 300.0, 1000.0)])
    assert state.batch == 8
    assert state.clocks_mhz == {"gpu": (300.0, 900.0, 1000.0)}
    assert state.power_watts == {"gpu": (10.0, 10.0, 10.0)}
    assert summarize(1, []).clocks_mhz == {}


def test_resident_memory(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  20000 kB\nVmRSS:\t   12345 kB\n")
    assert resident_bytes(tmp_path / "status") == 12345 * 1024
    (tmp_path / "odd").write_text("Name:\tpython\n")
    assert resident_bytes(tmp_path / "odd") is None
    assert resident_bytes(tmp_path / "none") is None
