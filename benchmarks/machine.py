"""The machine that measurements belong to."""

import datetime
import os
import platform
import re
from pathlib import Path

import torch

from ilnas_kernels import current_instruction_set


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, memory, instruction set and versions: what a figure must be read with."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "instruction_set": current_instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }


def file_stem(machine: dict[str, str | int]) -> str:
    """A file name for the machine's results."""
    name = re.sub(r"\((R|TM)\)|CPU|Processor", "", str(machine["processor"]), flags=re.IGNORECASE)
    label = f"{name} {machine['instruction_set']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def _processor() -> str:
    """The model name; where the system hides it, family and model number, which still tell generations apart."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", info.split("\n\n")[0], flags=re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if re.search(r"\d", name):
        return name
    return f"{name} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
