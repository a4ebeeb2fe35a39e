"""How reports look: one colour for each place in every figure, and the page's CSS and script."""

from __future__ import annotations

from planner.hardware import Hardware

# Chosen by search together with the CPU's and the disk's: any two places differ by at least 24 (CIE76) seen
# normally and under protanopia and deuteranopia, by 12 under tritanopia (Machado et al. 2009); the limit, a
# dashed line, by 18. Beyond eight GPUs colours repeat, and labels tell them apart.
GPU_COLOURS = ("#4f6092", "#60a971", "#bbbaee", "#276843", "#807cde", "#afd4c3", "#5d3bce", "#8dde7c")
CPU_COLOUR = "#dd9f2e"
DISK_COLOUR = "#868c95"
LIMIT_COLOUR = "#d5491e"
NEUTRAL_COLOUR = "#5c6773"

_WHITE, _BLACK = "#ffffff", "#000000"
# How far each kind of memory is mixed from its place's colour, and towards what.
_KIND_MIX = {
    "weights": (0.0, _WHITE),
    "kv_cache": (0.42, _WHITE),
    "activations": (0.7, _WHITE),
    "slots": (0.35, _BLACK),
}
_KIND_GREYS = {"workspace": "#9aa0a6", "context": "#c6cacf"}
KIND_WORDS = {"kv_cache": "KV cache"}


def place_colours(hardware: Hardware) -> dict[str, str]:
    """Return {device or memory: its colour} for all that the hardware names."""
    cpu_pools = {device.pool for device in hardware.devices if device.kind == "cpu"}
    gpu_pools = list(dict.fromkeys(device.pool for device in hardware.gpus))
    colours = {}
    for pool in hardware.pools:
        if pool.name in gpu_pools:
            colours[pool.name] = GPU_COLOURS[gpu_pools.index(pool.name) % len(GPU_COLOURS)]
        else:
            colours[pool.name] = CPU_COLOUR if pool.name in cpu_pools else DISK_COLOUR
    for device in hardware.devices:
        colours.setdefault(device.name, colours[device.pool])
    return colours


def kind_colour(kind: str, base: str) -> str:
    """Return the shade of a place's colour `base` that stands for a kind of memory there."""
    if kind in _KIND_GREYS:
        return _KIND_GREYS[kind]
    share, towards = _KIND_MIX.get(kind, (0.8, _WHITE))
    return mixed(base, towards, share)


def mixed(colour: str, towards: str, share: float) -> str:
    """Return `colour` moved by `share` (0 to 1) towards another; both as "#rrggbb"."""
    parts = [
        round(int(colour[at : at + 2], 16) * (1 - share) + int(towards[at : at + 2], 16) * share) for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)


def ink_on(colour: str) -> str:
    """Return black or white, whichever is read better on `colour` ("#rrggbb"; luminance as in WCAG 2)."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#10151a" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else _WHITE


def kind_words(kind: str) -> str:
    """Return a kind of memory as people read it."""
    return KIND_WORDS.get(kind, kind.replace("_", " "))


CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1c232b; --soft: #4d5864;
  --line: #dde1e6; --good: #1f6b45; --bad: #ac2f0c; --grid: #e4e8ec; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1b2128; --ink: #e9edf1;
  --soft: #aab4bf; --line: #323b45; --good: #7fd0a3; --bad: #ff9c7a; --grid: #313a44; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: clamp(1.35rem, 4.5vw, 2rem); line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 4px; }
p { margin: 0 0 8px; } .soft, figcaption { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 18px 0 0; padding: 0; }
.numbers > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; }
.numbers dt { color: var(--soft); font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.45rem; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere; }
.numbers small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 0; } .plot { width: 100%; }
.key { display: flex; flex-wrap: wrap; gap: 4px 14px; list-style: none; margin: 8px 0 4px; padding: 0;
  font-size: .85rem; }
.key i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 6px;
  vertical-align: -2px; border: 1px solid rgb(128 128 128 / .45); }
.key i.dash { width: 20px; height: 0; border: 0; border-top: 2px dashed; border-radius: 0;
  vertical-align: 4px; }
.wide { overflow-x: auto; background:
  linear-gradient(to right, var(--card) 40%, transparent) left / 48px 100% no-repeat local,
  linear-gradient(to left, var(--card) 40%, transparent) right / 48px 100% no-repeat local,
  linear-gradient(to right, rgb(128 128 128 / .35), transparent) left / 12px 100% no-repeat,
  linear-gradient(to left, rgb(128 128 128 / .35), transparent) right / 12px 100% no-repeat; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; } thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; white-space: nowrap; }
tbody th.layers { white-space: normal; overflow-wrap: anywhere; min-width: 110px; }
td.place { white-space: nowrap; } [role=note] { margin-top: 14px; }
ul.plain { margin: 0; padding-left: 20px; font-size: .92rem; }
ul.plain li { overflow-wrap: anywhere; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0;
  font-size: .92rem; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 18px 12px 32px; } section { padding: 14px 12px; }
  .numbers { grid-template-columns: 1fr 1fr; gap: 8px; } .numbers dd { font-size: 1.2rem; } }
@media print { section { break-inside: avoid; } }
"""

# Draws every figure, and again in other colours when the reader turns the page dark or light.
SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
function themed(layout) {
  const look = getComputedStyle(document.documentElement);
  const ink = look.getPropertyValue("--ink").trim(), grid = look.getPropertyValue("--grid").trim();
  const card = look.getPropertyValue("--card").trim();
  const copy = structuredClone(layout);
  copy.font = Object.assign({}, copy.font, {color: ink});
  copy.hoverlabel = {bgcolor: card, bordercolor: grid, align: "left", font: {color: ink}};
  for (const name of Object.keys(copy)) if (/^[xy]axis/.test(name))
    copy[name] = Object.assign({}, copy[name], {gridcolor: grid, linecolor: grid, zerolinecolor: grid});
  for (const menu of copy.updatemenus || [])
    Object.assign(menu, {bgcolor: dark.matches ? "#dfe4ea" : "#ffffff", bordercolor: grid});
  copy.showlegend = false;
  if (touch) copy.dragmode = false;
  return copy;
}
// No mode bar: on a phone it covers the labels, and one of its buttons would send the figure to a cloud.
const options = {responsive: true, displayModeBar: false, displaylogo: false};
function draw() {
  for (const [id, figure] of Object.entries(FIGURES))
    Plotly.react(id, figure.data, themed(figure.layout), options);
}
draw();
dark.addEventListener("change", draw);
"""
