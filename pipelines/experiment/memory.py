"""How much memory there is, and the refusal of what cannot fit, before anything is compiled."""

from collections.abc import Mapping
from pathlib import Path

import psutil

from pipelines.common.progress import size

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Files that say the limit, the use and what of it can be dropped, where a container has less than its machine."""

_FIXES = {
    "curves": "lower --rounds or --seeds, or raise --eval-every",
    "chunk": "lower --eval-every or --seeds",
    "state": "{smaller}, or lower --seeds",
    "client state": "{smaller}, or a method without state of the clients, or lower --seeds",
    "local training": "{smaller}, or lower --batch-size",
    "evaluation": "{smaller}, or lower --seeds",
    "cohorts": "lower --cohort-size or --seeds",
    "seeds": "lower --seeds, or what makes one large: --clients, --dim",
    "rounds": "lower --rounds or --seeds",
    "data": "leave out --mesh, or keep the examples in host memory with --staged",
}


def available() -> int:
    """Bytes that this process may still take: what the machine has, or the container that it runs in."""
    free = psutil.virtual_memory().available
    for limit, use, stat in _CGROUPS:
        try:
            most, used = int(Path(limit).read_text()), int(Path(use).read_text())
            lines = dict(line.split() for line in Path(stat).read_text().splitlines())
            free = min(free, most - used + int(lines.get("inactive_file", 0)))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
    return max(free, 0)


def fix(parts: Mapping[str, float], smaller: str = "take a smaller model") -> str:
    """How to need less memory, by what needs most of it.

    Args:
      parts: name, of `_FIXES`, to bytes.
      smaller: how to make the model smaller.
    """
    return _FIXES[max(parts, key=lambda part: parts[part])].format(smaller=smaller)


def refuse(what: str, parts: Mapping[str, float], have: float, smaller: str = "take a smaller model") -> None:
    """Raises ValueError if all parts together are more than there is; it tells them, and how to need less.

    Args:
      what: what needs them, for the message.
      parts: name, of `_FIXES`, to bytes that will be held at least.
      have: bytes there are.
      smaller: how to make the model smaller, for the message.
    """
    need = sum(parts.values())
    if need <= have:
        return
    listing = ", ".join(f"{part} {size(number)}" for part, number in parts.items() if number > need / 100)
    raise ValueError(
        f"{what} would hold at least {size(need)} of memory ({listing}) and there are {size(have)}: "
        f"{fix(parts, smaller)}"
    )
