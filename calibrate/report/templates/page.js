"use strict";
const page = JSON.parse(document.getElementById("findings").textContent);
const sixDigits = (value) => Number(value.toPrecision(6));

// Figures name their colours as CSS variables; plotly wants real ones.
function painted(part, style) {
  if (typeof part === "string") {
    return part.startsWith("var(--") ? style.getPropertyValue(part.slice(4, -1)).trim() : part;
  }
  if (Array.isArray(part)) return part.map((inner) => painted(inner, style));
  if (part && typeof part === "object") {
    return Object.fromEntries(Object.entries(part).map(([key, inner]) => [key, painted(inner, style)]));
  }
  return part;
}

async function draw(id) {
  const { data, layout } = painted(page.figures[id], getComputedStyle(document.documentElement));
  await Plotly.react(document.getElementById(id), data, layout, { responsive: true, displayModeBar: false });
}

// One figure at a time, so that the page answers while it fills.
async function drawAll() {
  document.documentElement.removeAttribute("data-drawn");
  for (const id of Object.keys(page.figures)) {
    await draw(id);
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.documentElement.dataset.drawn = Object.keys(page.figures).length;
}

// The slider of a phase: one scale factor for all layers, at the statistics' bin edges.
function listen(input) {
  const phase = input.dataset.phase;
  const curve = page.runs[0].phases[phase].curve;
  const output = document.getElementById(`answer-${phase}`);
  const percent = (share, digits) => `${Number((100 * share).toPrecision(digits))} %`;

  function show() {
    const index = Number(input.value);
    const factor = curve.scale_factor[index];
    const layers = curve.layer_sparsity.map((row) => row[index]);
    const most = layers.indexOf(Math.max(...layers));
    const lengths = curve.lengths.map((length, i) => `${percent(curve.length_sparsity[i][index], 3)} at ${length}`);
    const named = `scale factor ${Number(factor.toPrecision(4))} tokens`;
    output.innerHTML = `<b>${named}</b> skips <b>${percent(curve.sparsity[index], 3)}</b> of the tiles and drops ` +
      `<b>${percent(curve.dropped_mass[index], 3)}</b> of the softmax mass. By length: ${lengths.join(", ")} tokens. ` +
      `Most in layer ${most} (${percent(layers[most], 3)}).`;
    input.setAttribute("aria-valuetext", named);
    const bars = page.figures[`layers-${phase}`];
    bars.data[0].y = layers.map((share) => sixDigits(100 * share));
    const line = page.figures[`curves-${phase}`].layout.shapes[0];
    line.x0 = line.x1 = factor;
  }

  show();
  let waiting = false;
  input.addEventListener("input", () => {
    show();
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw(`layers-${phase}`);
      draw(`curves-${phase}`);
    });
  });
}

document.querySelectorAll("input[type=range]").forEach(listen);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
// After the first paint: the verdict is read before the figures are drawn.
requestAnimationFrame(() => setTimeout(drawAll));
