"""How much energy a simulated call takes: an estimate, from how long devices compute and what they draw at most."""

from __future__ import annotations

from planner.hardware import Device, products
from planner.plan import Plan
from simulate.timeline import Timeline


def energy_joules(plan: Plan, timeline: Timeline) -> dict[str, float]:
    """Return what every device takes for the call, in joules: its largest power while it computes, and a tenth of that
    else. Decode reads memory and draws less than the most, so this is rather too much. Memory, disks and fans are left
    out, as are devices whose power the catalogue does not have. Sources: `planner/products.json`, "power".
    """
    power = products()["power"]
    uses = {use.lane: use for use in timeline.utilisation()}
    found = {}
    for device in plan.hardware.devices:
        watts = watts_of(device)
        if watts is None:
            continue
        use = uses.get(f"{device.name} compute")
        busy_ns = 0.0
        if use is not None:
            busy_ns = use.prefill * timeline.prefill_ns + use.decode * (timeline.total_ns - timeline.prefill_ns)
        idle_ns = timeline.total_ns - busy_ns
        found[device.name] = watts * (busy_ns + power["idle_fraction"] * idle_ns) / 1e9
    return found


def watts_of(device: Device) -> float | None:
    """Return the largest power of a device in watts; None where the catalogue has no product of its name."""
    power = products()["power"]
    if device.kind == "cpu":
        return float(power["host_watts"])
    names = {entry["name"]: key for table in ("products", "rocm") for key, entry in products()[table].items()}
    key = names.get(device.product, device.product)
    return float(power["watts"][key]) if key in power["watts"] else None
