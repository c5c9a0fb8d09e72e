"""What the machine tells of itself while it works: clocks, power, memory. Everything is read, nothing is set.

The kernel tells clocks (cpufreq, devfreq) and power (hwmon: on a Jetson an INA3221 with a channel for each supply
rail); NVIDIA's driver tells those of a GPU, where the package ``nvidia-ml-py`` is installed. What a machine does not
tell is left out. Rails overlap on many boards (one feeds another), so they are never added up.

Source: the kernel's Documentation/hwmon/sysfs-interface.rst and ina3221.rst, admin-guide/pm/cpufreq.rst and
ABI/testing/sysfs-class-devfreq; NVML API Reference Guide.
"""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from edgeres.measurements import BoardState

SYSFS = Path("/sys")
STATUS = Path("/proc/self/status")
INA3221_CHANNELS = (1, 2, 3)
"""Linux's driver also has a fourth current, the sum of these, and in4 to in6, voltages over the shunts: no rails.

Source: the kernel's Documentation/hwmon/ina3221.rst.
"""

Reader = Callable[[], float]


class Reading(NamedTuple):
    """One look at the board: MHz by clock, watts by rail or GPU."""

    clocks_mhz: Dict[str, float]
    power_watts: Dict[str, float]


class Board:
    """The sensors of a machine, found once; made by :func:`open_board`."""

    def __init__(self, clocks: Dict[str, Reader], power: Dict[str, Reader]) -> None:
        self._clocks = clocks
        self._power = power

    def read(self) -> Reading:
        """Return what the sensors say now; one that does not answer this time is left out."""
        return Reading(_answers(self._clocks), _answers(self._power))


def open_board(sysfs: Path = SYSFS, nvml: Optional[Any] = None) -> Board:
    """Return the sensors of this machine.

    Args:
        sysfs: where the kernel's tree stands.
        nvml: the module ``pynvml``, initialized; by default the installed one, where it finds a driver.
    """
    clocks = {**_cpu_clock(sysfs), **_device_clocks(sysfs)}
    power = _rails(sysfs)
    gpus = _installed_nvml() if nvml is None else nvml
    if gpus is not None:
        for found, known in zip(_nvidia_gpus(gpus), (clocks, power)):
            known.update(found)
    return Board(clocks, power)


def summarize(batch: int, readings: Sequence[Reading]) -> BoardState:
    """Return lowest, median and highest of each sensor over some readings; of those that answered at all."""

    def spread(parts: Sequence[Dict[str, float]]) -> Dict[str, Tuple[float, float, float]]:
        names = dict.fromkeys(name for part in parts for name in part)
        values = {name: [part[name] for part in parts if name in part] for name in names}
        return {name: (min(all_), statistics.median(all_), max(all_)) for name, all_ in values.items()}

    return BoardState(batch, spread([r.clocks_mhz for r in readings]), spread([r.power_watts for r in readings]))


def resident_bytes(status: Path = STATUS) -> Optional[int]:
    """Return the memory that this process holds in RAM (its resident set); None where the kernel does not tell.

    Source: proc(5), ``VmRSS`` in /proc/self/status, in KiB.
    """
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _answers(readers: Dict[str, Reader]) -> Dict[str, float]:
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except (OSError, ValueError, ArithmeticError, _Silent):  # switched off, asleep, or gone
            continue
    return found


class _Silent(Exception):
    """A GPU's driver does not tell this."""


def _number(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _listed(folder: Path, pattern: str) -> List[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _cpu_clock(sysfs: Path) -> Dict[str, Reader]:
    """Return the mean of the cores' clocks, which cpufreq gives in kHz for each policy."""
    files = _listed(sysfs / "devices/system/cpu/cpufreq", "policy*/scaling_cur_freq")
    return {"cpu": lambda: statistics.mean(map(_number, files)) / 1e3} if files else {}


def _device_clocks(sysfs: Path) -> Dict[str, Reader]:
    """Return the clocks that devfreq gives, in Hz: a Jetson's GPU and accelerators, by the names of the kernel."""
    files = _listed(sysfs / "class/devfreq", "*/cur_freq")
    return {path.parent.name: _product(path, scale=1e-6) for path in files}


def _rails(sysfs: Path) -> Dict[str, Reader]:
    """Return what hwmon tells of power: ``power*`` in µW, and an INA3221's voltage (mV) times current (mA)."""
    found: Dict[str, Reader] = {}
    for chip in _listed(sysfs / "class/hwmon", "hwmon*"):
        name = _text(chip / "name")
        for path in (*_listed(chip, "power*_input"), *_listed(chip, "power*_average")):
            channel = path.name.split("_")[0]
            found[_unused(found, _text(chip / f"{channel}_label") or name or chip.name)] = _product(path, scale=1e-6)
        if name != "ina3221":
            continue
        for number in INA3221_CHANNELS:
            path = chip / f"curr{number}_input"
            label = _text(chip / f"in{number}_label")
            if path.exists() and (chip / f"in{number}_input").exists() and label != "NC":  # not connected
                rail = _unused(found, label or f"{chip.name} channel {number}")
                found[rail] = _product(chip / f"in{number}_input", path, scale=1e-6)
    return found


def _unused(found: Dict[str, Reader], name: str) -> str:
    """Return a name, with a number behind it where another sensor has it already."""
    same = sum(1 for other in found if other == name or other.startswith(f"{name} #"))
    return f"{name} #{same + 1}" if same else name


def _product(*paths: Path, scale: float) -> Reader:
    def read() -> float:
        value = scale
        for path in paths:
            value *= _number(path)
        return value

    return read


def _installed_nvml() -> Optional[Any]:
    """Return NVIDIA's management library, initialized; None where its package or a driver is missing."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _nvidia_gpus(nvml: Any) -> Tuple[Dict[str, Reader], Dict[str, Reader]]:
    """Return clocks and power of each NVIDIA GPU; ``gpu``, or numbered where there are several."""

    def asking(question: Callable[..., Any], *arguments: Any, scale: float = 1.0) -> Reader:
        def read() -> float:
            try:
                return scale * float(question(*arguments))
            except nvml.NVMLError as problem:
                raise _Silent(str(problem)) from None

        return read

    clocks: Dict[str, Reader] = {}
    power: Dict[str, Reader] = {}
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return clocks, power
    for index, handle in enumerate(handles):
        name = "gpu" if len(handles) == 1 else f"gpu{index}"
        clocks[name] = asking(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
        clocks[f"{name} memory"] = asking(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM)
        power[name] = asking(nvml.nvmlDeviceGetPowerUsage, handle, scale=1e-3)  # mW
    return clocks, power
